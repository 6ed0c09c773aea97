"""Removes secrets from texts on shared disks, by the launcher's own rules and then by those of detect-secrets."""

from functools import cache
from typing import Any

from launchers.folder.secrets import REMOVED
from launchers.folder.secrets import redact as by_own_rules

_LONGEST_LINE = 20_000  # longer lines are data, not code, and detectors take seconds per megabyte


@cache
def _detectors() -> tuple[Any, ...]:
    """Detectors of shapes, without those of high-entropy hexadecimals (git hashes look like that) and of public IPs."""
    from detect_secrets.plugins import (
        artifactory,
        aws,
        azure_storage_key,
        basic_auth,
        cloudant,
        discord,
        github_token,
        gitlab_token,
        ibm_cloud_iam,
        ibm_cos_hmac,
        jwt,
        mailchimp,
        npm,
        openai,
        pypi_token,
        sendgrid,
        slack,
        softlayer,
        square_oauth,
        stripe,
        telegram_token,
        twilio,
    )

    return (
        artifactory.ArtifactoryDetector(),
        aws.AWSKeyDetector(),
        azure_storage_key.AzureStorageKeyDetector(),
        basic_auth.BasicAuthDetector(),
        cloudant.CloudantDetector(),
        discord.DiscordBotTokenDetector(),
        github_token.GitHubTokenDetector(),
        gitlab_token.GitLabTokenDetector(),
        ibm_cloud_iam.IbmCloudIamDetector(),
        ibm_cos_hmac.IbmCosHmacDetector(),
        jwt.JwtTokenDetector(),
        mailchimp.MailchimpDetector(),
        npm.NpmDetector(),
        openai.OpenAIDetector(),
        pypi_token.PypiTokenDetector(),
        sendgrid.SendGridDetector(),
        slack.SlackDetector(),
        softlayer.SoftlayerDetector(),
        square_oauth.SquareOAuthDetector(),
        stripe.StripeDetector(),
        telegram_token.TelegramBotTokenDetector(),
        twilio.TwilioKeyDetector(),
    )


def redact(text: str) -> str:
    """``text`` without what either set of rules considers a secret."""
    return "\n".join(_line(line) for line in by_own_rules(text).split("\n"))


def _line(line: str) -> str:
    if len(line) > _LONGEST_LINE:
        return line
    for detector in _detectors():
        for found in set(detector.analyze_string(line)):
            if found and found not in REMOVED:
                line = line.replace(found, REMOVED)
    return line
