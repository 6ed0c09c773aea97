"""The rows of the table in docs/damage.md, each with the draw that shows it; `python -m tests.fuzz.rows` prints it."""

from dataclasses import dataclass

from tests.fuzz.damage import Damage
from tests.fuzz.draws import Draw
from tests.fuzz.options import BASE, OptionDraw
from tests.fuzz.targets import NO_HASH, NOBODY_KNOWS, READERS, TARGETS


@dataclass(frozen=True, kw_only=True)
class Row:
    """``says``: a regular expression that the answer's stderr (or stdout) holds. ``light``: needs no trained run."""

    file: str
    damage: str
    answer: str
    draw: Draw | OptionDraw
    code: int = 2
    says: str
    light: bool = False

    def line(self) -> str:
        if isinstance(self.draw, Draw):
            argv = READERS[self.draw.reader].argv
            command = " ".join(argv[: 2 if argv[0] in ("data", "convert", "scaling") else 1])
        else:
            command = " ".join(self.draw.verb)
        return f"| {self.file} | {self.damage} | {self.answer} | `{command}` |"


def _file(target: str, reader: str, damage: Damage, file: int = 0) -> Draw:
    assert reader in TARGETS[target].readers
    return Draw(target=target, reader=reader, file=file, damage=damage)


def _option(verb: str, *argv: str, instead: bool = False) -> OptionDraw:
    base = BASE[tuple(verb.split())][0]
    return OptionDraw(verb.split(), [*argv, *base[1:]] if instead else [*base, *argv], [])


# Where a value lies in a file: numbers as draws have them; which key they mean is said by the row.
ROWS: tuple[Row, ...] = (
    Row(
        file="a checkpoint's tensors", damage="one bit of the newest one",
        answer="named; the run resumes from the previous checkpoint, with the same losses",
        draw=_file("checkpoint tensors", "train", ["flip", 5000, 3]), code=0,
        says=r"step_00000004.*SHA-256(.|\n)*resumed from stopped/checkpoints/step_00000002",
    ),
    Row(
        file="a checkpoint's tensors", damage="one bit of the newest one", answer="named; the previous one is exported",
        draw=_file("checkpoint tensors", "to-hf", ["flip", 5000, 3]), code=0, says="step_00000006 is damaged and not used",
    ),
    Row(
        file="a checkpoint outside a run", damage="one bit", answer="refused",
        draw=_file("checkpoint tensors", "to-hf of an import", ["flip", 5000, 3]), says="is damaged", light=True,
    ),
    Row(
        file="`manifest.json`", damage="truncated", answer="as with damaged tensors: the previous checkpoint is used",
        draw=_file("checkpoint manifest", "train", ["cut", 1000]), code=0, says="manifest.json(.|\n)*step_00000002",
    ),
    Row(
        file="`manifest.json`", damage="a list instead of an object", answer="refused",
        draw=_file("checkpoint manifest", "to-hf of an import", ["only", "[]"]), says="manifest.json", light=True,
    ),
    Row(
        file="`.metadata`", damage="replaced by another file", answer="refused, and not executed",
        draw=_file("checkpoint metadata", "to-hf of an import", ["append", "x"]), says=".metadata", light=True,
    ),
    Row(
        file="`model_config.json`", damage="truncated", answer="refused",
        draw=_file("checkpoint model_config", "to-hf of an import", ["cut", 50]), says="model_config.json", light=True,
    ),
    Row(
        file="`hf_shards.json`", damage="a path that leads out of the folder", answer="refused",
        draw=_file("checkpoint hf_shards", "to-hf of an import", ["value", 5, "outside"]), says="hf_shards.json", light=True,
    ),
    Row(
        file="data `.bin`", damage="one bit", answer="refused: the data are not what the run was trained on",
        draw=_file("data tokens", "train", ["flip", 500, 0]), says="corpus",
    ),
    Row(
        file="data `.bin`", damage="truncated", answer="refused",
        draw=_file("data tokens", "data info", ["cut", 500]), says="truncated or belongs to another index",
    ),
    Row(
        file="data `.idx`", damage="one bit of a pointer", answer="refused",
        draw=_file("data index", "train", ["flip", 200, 2]), says="corpus",
    ),
    Row(
        file="data `PREFIX.json`", damage="truncated", answer="refused",
        draw=_file("data manifest", "train", ["cut", 100]), says="corpus.json",
    ),
    Row(
        file="the run's `data_cache`", damage="one bit of an index", answer="made again, and losses are the same",
        draw=_file("data cache", "train", ["flip", 150, 4], file=1), code=0, says="",
    ),
    Row(
        file="the run's `data_cache`", damage="a file truncated by a kill", answer="made again, and losses are the same",
        draw=_file("data cache", "train", ["cut", 150], file=1), code=0, says="",
    ),
    Row(
        file="a recipe", damage="a section given twice", answer="refused",
        draw=_file("recipe", "info", ["twice", 1]), says="twice|duplicate", light=True,
    ),
    Row(
        file="a recipe", damage="lists in lists, 20,000 deep", answer="refused",
        draw=_file("recipe", "info", ["only", "[" * 20000]), says="recipe.yaml", light=True,
    ),
    Row(
        file="a recipe", damage="not UTF-8", answer="refused",
        draw=_file("recipe", "info", ["insert", 10, "\udcff"]), says="cannot be read", light=True,
    ),
    Row(
        file="a recipe", damage="a directory in its place", answer="refused",
        draw=_file("recipe", "info", ["directory"]), says="cannot be read", light=True,
    ),
    Row(
        file="a recipe's number", damage="`.nan`, `.inf`, `true`", answer="refused",
        draw=_option("launch", "optimizer.learning_rate=true"), says="learning_rate", light=True,
    ),
    Row(
        file="a recipe's number", damage="another valid number", answer="**not noticed**: " + NOBODY_KNOWS,
        draw=_file("recipe", "info", ["value", 12, "zero"]), code=2, says="", light=True,
    ),
    Row(
        file="a site file", damage="a table given twice, an unknown key", answer="refused",
        draw=_file("site file", "launch", ["twice", 2]), says="site.toml", light=True,
    ),
    Row(
        file="a site file", damage="`nan` for a number", answer="refused",
        draw=_file("site file", "launch", ["value", 7, "nan"]), says="site.toml", light=True,
    ),
    Row(
        file="a GPU's or network's file", damage="`.nan` for a number", answer="refused",
        draw=_file("hardware", "plan", ["value", 1, "nan"]), says="gpu.yaml", light=True,
    ),
    Row(
        file="`config.json` of Hugging Face", damage="a list for a number", answer="refused",
        draw=_file("hf config", "from-hf", ["value", 3, "list"]), says="config.json", light=True,
    ),
    Row(
        file="`model.safetensors.index.json`", damage="a tensor left out", answer="refused",
        draw=_file("hf index", "from-hf", ["without", 7]), says="hf", light=True,
    ),
    Row(
        file="a `.safetensors` header", damage="one bit", answer="refused",
        draw=_file("hf weights", "from-hf", ["flip", 9, 3]), says="safetensors", light=True,
    ),
    Row(
        file="a `.safetensors` file", damage="truncated", answer="refused",
        draw=_file("hf weights", "from-hf", ["cut", 9000]), says="safetensors", light=True,
    ),
    Row(
        file="a `.safetensors` file", damage="one bit of a weight", answer="**not noticed**: " + NO_HASH,
        draw=_file("hf weights", "from-hf", ["flip", 15000, 0]), code=0, says="", light=True,
    ),
    Row(
        file="a table of runs", damage="a column given twice", answer="refused",
        draw=_file("runs table", "fit", ["column_twice", 5]), says="runs.csv.*loss", light=True,
    ),
    Row(
        file="a table of runs", damage="`nan`, text or nothing in a cell", answer="refused, with the line",
        draw=_file("runs table", "fit", ["cell", 7, "nan"]), says="runs.csv:", light=True,
    ),
    Row(
        file="a table of runs", damage="Excel's byte order mark", answer="read as if it were not there",
        draw=_file("runs table", "fit", ["bom"]), code=0, says="",
    ),
    Row(
        file="`fit.json`", damage="truncated", answer="refused",
        draw=_file("fit", "recommend", ["cut", 900]), says="fit.json",
    ),
    Row(
        file="`metrics.jsonl`", damage="the last line truncated by a crash", answer="left out; the step is trained again",
        draw=_file("metrics", "train", ["append", '{"step": 1'], file=0), code=0, says="",
    ),
    Row(
        file="`metrics.jsonl`", damage="a line in the middle", answer="refused by commands that compute from it",
        draw=_file("metrics", "report", ["zero_block", 900, 60]), says="metrics.jsonl", light=True,
    ),
    Row(
        file="`launch/launch.json`", damage="truncated", answer="refused",
        draw=_file("launch record", "status", ["cut", 300]), says="launch.json", light=True,
    ),
    Row(
        file="a run's `lock`, `progress`", damage="any content", answer="no effect: only the lock itself counts",
        draw=_file("run leftovers", "train", ["append", "x"]), code=0, says="",
    ),
    Row(
        file="an option", damage="`nan`, `inf`, beyond a float", answer="refused",
        draw=_option("plan", "--imbalance=nan"), says="imbalance", light=True,
    ),
    Row(
        file="an option", damage="an empty path", answer="refused",
        draw=_option("convert from-hf", "", "out", instead=True), says="error", light=True,
    ),
    Row(
        file="an option", damage="a seed past 64 bits", answer="refused",
        draw=_option("generate", f"--seed={2**64}"), says="seed",
    ),
    Row(
        file="an option", damage="temperature 1e-300", answer="accepted; samples greedily, which is the limit",
        draw=_option("generate", "--temperature=1e-300"), code=0, says="",
    ),
)  # fmt: skip


def table() -> str:
    lines = [row.line() for row in ROWS]
    return "\n".join(["| what | damage | what happens | seen by |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(table())
