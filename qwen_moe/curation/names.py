"""The steps of a curation, in their order. Imports nothing, so that the command's help is quick."""

STEPS = (
    "synthesise",
    "read",
    "filters",
    "scores",
    "domains",
    "deduplication",
    "decontamination",
    "weights",
    "prepare",
)
