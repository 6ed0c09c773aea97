"""Finds what looks like a secret, by name and by shape; doubtful values count as secrets.

Uses the standard library only, because it runs on nodes without other packages.
"""

import re
from collections.abc import Iterator

REMOVED = "[removed: looks like a secret]"

# Parts of the names of variables, JSON and YAML keys, and command options; case does not matter.
_IN_NAMES = (
    r"secret|passw|passphrase|passcode|credential|contrasen|private_?key|priv_?key|api_?key|access_?key|account_?key|"
    r"auth_?key|ssh_?key|signing_?key|encryption_?key|storage_?key|service_?key|master_?key|client_?key|license_?key|"
    r"deploy_?key|shared_?access|webhook|bearer|cookie|jwt|token(?!iz|s?_(?:per|count|limit|id)|s(?:_|$|[A-Z]))"
)
# Whole words of names.
_WORDS = r"(?:^|_)(?:pass|pw|pwd)$|(?:^|_)(?:pat|pats|auth|oauth|authorization|sas|dsn|creds?|certs?|pin|netrc)(?:_|$)"
_NAME = re.compile(f"{_IN_NAMES}|{_WORDS}", re.IGNORECASE)
_KEY_WORD = re.compile(r"(?:^|_)keys?(?:_|$)", re.IGNORECASE)  # for variables only: in code, `key=` is not a secret
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_SECRET = {"PWD", "OLDPWD"}

# Keys and tokens with a known prefix. If a pattern has a group, only the group is removed.
_SHAPES = (
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bapi_org_[A-Za-z0-9]{16,}",
    r"\bgh[pousr]_[A-Za-z0-9]{16,}",
    r"\bgithub_pat_\w{16,}",
    r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|oas)-[A-Za-z0-9_.=-]{16,}",
    r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{10,}",
    r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b",
    r"\bAIza[0-9A-Za-z_-]{30,}",
    r"\bya29\.[0-9A-Za-z_-]{16,}",
    r"\bGOCSPX-[0-9A-Za-z_-]{16,}",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"\bxapp-[A-Za-z0-9-]{10,}",
    r"\bnpm_[A-Za-z0-9]{30,}",
    r"\bpypi-[A-Za-z0-9_-]{30,}",
    r"\bdop_v1_[0-9a-f]{40,}",
    r"\bdckr_(?:pat|oat)_[A-Za-z0-9_-]{16,}",
    r"\bdapi[0-9a-f]{32}",
    r"\bhv[sbr]\.[A-Za-z0-9_-]{16,}",
    r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    r"\bATATT3[A-Za-z0-9_=-]{16,}",
    r"\bnvapi-[A-Za-z0-9_-]{16,}",
    r"\br8_[A-Za-z0-9]{30,}",
    r"\bgsk_[A-Za-z0-9]{20,}",
    r"\bwandb_v1_[A-Za-z0-9_]{20,}",
    r"\bAGE-SECRET-KEY-1[0-9A-Z]{20,}",
    r"\b\d{8,10}:AA[A-Za-z0-9_-]{30,}",
    r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?",
    r"https://hooks\.slack\.com/services/[A-Za-z0-9/_-]+",
    r"(?i:\b(?:AccountKey|SharedAccessKey)=)([A-Za-z0-9+/=]{16,})",
    r"(?i:[?&](?:sig|signature|x-amz-signature|access_token|token|key)=)([A-Za-z0-9%+/=_.-]{12,})",
    # A URL's password; the user and the host are kept.
    r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/:@'\"]*:([^\s/@'\"]+)@",
    r"(?i:\b(?:bearer|basic)\s+)((?=[^\s'\"]*[0-9=])[A-Za-z0-9._~+/=-]{8,})",
    r"(?i:\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)([^\s'\",}]{8,})",
    r"(?i:\blogin\s+\S+\s+password\s+)(\S+)",  # ~/.netrc
    r"(?i:\bwandb\s+login\s+(?:--\S+\s+)*)([0-9a-f]{40})",
)
_SHAPE = tuple(re.compile(text) for text in _SHAPES)
# Whole blocks, also as lines of a diff, and also if their end is missing.
_BLOCK = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL)

_QUOTED = r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'"
_ASSIGNMENT = re.compile(
    rf"(?P<name>[A-Za-z_][\w.-]*)(?P<sign>['\"]?\]?\s*(?::=|=>|=|:(?!:))\s*[rbuf]?)(?P<value>{_QUOTED}|[^\s,;'\"]+)"
)
_OPTION = re.compile(rf"(?P<name>--[A-Za-z][\w-]*)(?P<sign>\s+)(?P<value>{_QUOTED}|[^\s-]\S*)")
_PLAIN = re.compile(
    r"[+-]?[\d_.]+(?:e[+-]?\d+)?|true|false|null|none|yes|no|on|off|str|int|bool|dict|list", re.IGNORECASE
)
_REFERENCE = re.compile(r"\$|<|\{\{|%\(|[\[({]|[A-Za-z_][\w.]*[(\[]")
_STRONG = re.compile(r"passw|passphrase|secret|credential|(?:^|_)(?:pass|pwd|pw)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """True for names of environment variables, keys or options that are likely to hold a secret."""
    if name in _NOT_SECRET:
        return False
    words = _words(name)
    return bool(_NAME.search(words) or _KEY_WORD.search(words) or _NAME.search(name))


def has_secret(value: str) -> bool:
    """True if a text contains the known shape of a key, a token or a password in a URL."""
    return bool(_BLOCK.search(value)) or any(shape.search(value) for shape in _SHAPE)


def hidden(name: str, value: str) -> str:
    """The value of a variable, or REMOVED if it looks like a secret."""
    return REMOVED if (is_secret(name) and not _PLAIN.fullmatch(value)) or has_secret(value) else value


def redact(text: str) -> str:
    """``text`` without keys, tokens and passwords: known shapes, and values assigned to names of secrets."""
    text = _BLOCK.sub(REMOVED, text)
    for shape in _SHAPE:
        text = shape.sub(lambda match: match[0].replace(match[match.lastindex or 0], REMOVED), text)
    text = _ASSIGNMENT.sub(_assigned, text)
    return _OPTION.sub(_assigned, text)


def redact_command(words: list[str]) -> list[str]:
    """Redact a command line: each word by itself, and as the value of the option before it."""
    return list(_redacted_words(words))


def _redacted_words(words: list[str]) -> Iterator[str]:
    before = ""
    for word in words:
        name, separator, value = word.partition("=")
        if before.startswith("--") and is_secret(before) and not word.startswith("-"):
            yield REMOVED
        elif separator and is_secret(name) and not _PLAIN.fullmatch(value):
            yield f"{name}={REMOVED}"
        else:
            yield redact(word)
        before = word


def _words(name: str) -> str:
    """`accessToken` or `access-token` as `access_token`."""
    return re.sub(r"[^A-Za-z0-9]+", "_", _CAMEL.sub("_", name))


def _assigned(match: re.Match[str]) -> str:
    name, value = match["name"].lstrip("-"), match["value"]
    words = _words(name)
    if not (_NAME.search(words) or _NAME.search(name)) or REMOVED.startswith(value) or REMOVED in value:
        return match[0]
    quoted = value[0] in "\"'"
    inner = value[1:-1] if quoted else value
    if not inner or _PLAIN.fullmatch(inner) or inner.startswith("[removed"):
        return match[0]
    strong = _STRONG.search(words)
    if not quoted and _REFERENCE.match(inner):
        return match[0]  # $VARIABLE, a call, an index: code that reads the value from elsewhere
    if strong:
        secret = len(inner) >= 3
    else:
        # `token: "<|endoftext|>"` and `token = text` are not secrets; long strings with digits are.
        secret = len(inner) >= 8 and bool(re.search(r"\d", inner)) and not re.search(r"[<>|\s]", inner)
    if not secret:
        return match[0]
    return f"{match['name']}{match['sign']}" + (f"{value[0]}{REMOVED}{value[0]}" if quoted else REMOVED)
