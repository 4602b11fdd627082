"""`python -m ipex_sq fine-tune`: a classifier made of an encoder, in minutes on a CPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.config import EMBEDDED, OutputConfig
from ipex_sq.errors import ConfigError
from ipex_sq.review_config import FineTuneConfig, ReviewConfig

DESCRIPTION = """\
Train a whole encoder with a classification head on reviews, seeded, on this CPU, and save it. The
embedded encoder (MiniLM) becomes the model that the other commands take as `embedded`; where it
was trained before it is used again. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq fine-tune                                     # the embedded classifier
  python -m ipex_sq fine-tune --model bert-base-uncased --output_dir my-classifier
  python -m ipex_sq fine-tune --train_dataset train.jsonl --dataset eval.jsonl \\
      --output_dir my-classifier
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_flag(
        "model", default=EMBEDDED, help=f"hub name, local folder, or {EMBEDDED} (default)"
    )
    flags.add_flag(
        "output_dir",
        type=Path,
        help="where to save it (default for the embedded encoder on its own reviews: the cache)",
    )
    flags.add_flag("train_dataset", help="reviews to learn from (default: those of --dataset)")
    flags.add_flag("force", action="store_true", help="train again where it was trained before")
    flags.add_config(ReviewConfig, skip=("calib_dataset", "num_samples", "max_length", "seed"))
    flags.add_config(FineTuneConfig)
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, train, save.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    flags = parser().parse_args(arguments)
    config = build(FineTuneConfig, flags)
    check_output(flags.output)

    from ipex_sq.checkpoint.folders import check_writable
    from ipex_sq.checkpoint.replacing import replace_folder
    from ipex_sq.data.documents import row_digests
    from ipex_sq.evaluation.runs import describe
    from ipex_sq.models.finetuning import TRAINING, fine_tune
    from ipex_sq.system import provenance

    folder = _folder(flags)
    asked = {"model": flags.model, "dataset": flags.dataset, "train": flags.train_dataset}
    asked |= {"limit": flags.limit, **asdict(config)}
    known = _record(folder / TRAINING)
    if known.get("asked") == asked and not flags.force:
        show(f"{folder} was fine-tuned before (--force trains again)", known, flags.output)
        return
    check_writable(folder, TRAINING)
    sets = _reviews(flags)
    training, validation = (_labelled(texts.documents) for texts in sets)
    classifier, accuracies = fine_tune(flags.model, training, validation, config)
    result = {
        "model": flags.model,
        "folder": folder.name,
        **provenance(),
        "asked": asked,
        "training": describe(sets[0]),
        "validation": describe(sets[1]),
        "accuracies": accuracies,
    }

    def write(scratch: Path) -> None:
        classifier.model.save_pretrained(scratch)  # type: ignore[operator]
        classifier.tokenizer.save_pretrained(scratch)
        record = {**result, "row_sha256": row_digests(sets[0].documents)}
        (scratch / TRAINING).write_text(json.dumps(record) + "\n", encoding="utf-8")

    replace_folder(folder, write, TRAINING)
    reached = ", ".join(f"{100 * accuracy:.2f} %" for accuracy in accuracies)
    show(f"{folder}: accuracy on {sets[1].name} after each epoch: {reached}", result, flags.output)


def _labelled(reviews: Sequence[Any]) -> Any:
    from ipex_sq.models.finetuning import Labelled

    texts, labels = [item.text for item in reviews], [item.label for item in reviews]
    return Labelled(texts, labels, reviews[0].names)


def _folder(flags: argparse.Namespace) -> Path:
    from ipex_sq.models.embedded_encoder import embedded_classifier_place

    if flags.output_dir is not None:
        return Path(flags.output_dir)
    if flags.model != EMBEDDED:
        raise ConfigError("--output_dir names where to save the classifier")
    return embedded_classifier_place()


def _record(path: Path) -> dict[str, Any]:
    """What a classifier was trained on, or nothing where it was not."""
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in record.items() if key != "row_sha256"}


def _reviews(flags: argparse.Namespace) -> tuple[Any, Any]:
    """Reviews to train on, and to validate on."""
    from ipex_sq.data.documents import check_disjoint
    from ipex_sq.data.reviews import load_reviews, training_reviews

    validation = load_reviews(flags.dataset).first(flags.limit)
    if flags.train_dataset is None:
        training = training_reviews(validation)
    else:
        training = load_reviews(flags.train_dataset, purpose="calibration")
    check_disjoint(training.documents, validation.documents)
    return training, validation
