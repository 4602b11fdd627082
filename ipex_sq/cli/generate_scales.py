"""`python -m ipex_sq generate-scales`: statistics of what a classifier's Linears read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show, write_atomically
from ipex_sq.config import EMBEDDED
from ipex_sq.errors import ConfigError
from ipex_sq.review_config import ReviewConfig

DESCRIPTION = """\
Run a sequence classifier over calibration texts and write minimum, maximum and largest absolute
value of every input channel of every Linear, as JSON. One file serves every alpha of `quantize`.
Padding is not seen. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq generate-scales --output act_scales/embedded.json
  python -m ipex_sq generate-scales --model bert-base-uncased \\
      --output act_scales/bert-base-uncased.json --num_samples 128 --max_length 128
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_flag(
        "model", default=EMBEDDED, help=f"hub name, local folder, or {EMBEDDED} (default)"
    )
    flags.add_flag("output", type=Path, required=True, help="the file to write")
    flags.add_config(ReviewConfig, skip=("limit",))
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, calibrate, write.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    flags = parser().parse_args(arguments)
    config = build(ReviewConfig, flags)
    output: Path = flags.output
    if output.exists() and not output.is_file():
        raise ConfigError(f"--output {output} is a folder, name a file")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_output(output)

    from ipex_sq.evaluation.reviews import calibration_reviews, review_batches, review_source
    from ipex_sq.models.calibration import calibrate
    from ipex_sq.models.classifier import load_classifier
    from ipex_sq.models.identity import model_sha256, tokenizer_sha256
    from ipex_sq.recipe.scales_files import scales_to_json
    from ipex_sq.system import provenance

    texts = calibration_reviews(config)
    classifier = load_classifier(flags.model)
    batches = review_batches(classifier, texts, config)
    model = {"name": flags.model, "sha256": model_sha256(classifier.model)}
    tokenizer = {"sha256": tokenizer_sha256(classifier.tokenizer)}
    source = review_source(texts, config)
    stats = calibrate(classifier.model, batches, source, samples=False, hessians=False)
    write_atomically(output, scales_to_json(stats, model, tokenizer) + "\n")
    result = {
        "model": model,
        "output": str(output),
        **provenance(),
        "calibration": {key: value for key, value in source.items() if key != "row_sha256"},
        "linears": len(stats.linears),
        "texts": stats.texts,
        "tokens": stats.tokens,
        "seconds": stats.seconds,
    }
    table = (
        f"{output}: {len(stats.linears)} Linears of {flags.model}, {stats.texts} texts of "
        f"{texts.name} with {stats.tokens} tokens, {stats.seconds:.1f} s"
    )
    show(table, result, None)
