"""A short fine-tuning of a whole encoder with a classification head, on the CPU."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ipex_sq.config import EMBEDDED
from ipex_sq.errors import ConfigError
from ipex_sq.models.classifier import Classifier, class_order, load_classifier
from ipex_sq.models.embedded_encoder import embedded_encoder_folder
from ipex_sq.models.vocabulary import check_token_ids
from ipex_sq.review_config import FineTuneConfig

logger = logging.getLogger(__name__)

TRAINING = "ipex_sq_training.json"
"""Beside a fine-tuned model: what it was trained on."""

LEAST_LABELS = 2


@dataclass(frozen=True)
class Labelled:
    """Texts with the index of their label, and the labels' names by index, where there are any."""

    texts: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str] = ()


def fine_tune(
    name_or_path: str, training: Labelled, validation: Labelled, config: FineTuneConfig
) -> tuple[Classifier, list[float]]:
    """Train every weight of an encoder and its head; the seed decides all that is drawn.

    Args:
        name_or_path: "embedded", a local folder or a hub name; a missing head is made.
        training: To learn from.
        validation: To measure on after every epoch; nothing is chosen by it.
        config: How long and how fast.

    Returns:
        The classifier, and its accuracy on `validation` (0 to 1) after every epoch.

    Raises:
        ConfigError: One class only.
        DataError, UnsupportedModelError: see `load_classifier`.
    """
    classes = max([*training.labels, *validation.labels]) + 1
    if classes < LEAST_LABELS or len(set(training.labels)) < LEAST_LABELS:
        raise ConfigError("the training reviews are all of one class: pass reviews of at least two")
    source = str(embedded_encoder_folder()) if name_or_path == EMBEDDED else name_or_path
    classifier = load_classifier(source, num_labels=classes)
    return _train(classifier, (training, validation), config)


def _train(
    classifier: Classifier, sets: tuple[Labelled, Labelled], config: FineTuneConfig
) -> tuple[Classifier, list[float]]:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    set_seed(config.seed)
    progress = _progress_callback()
    training, validation = (_rows(classifier, labelled, config.max_length) for labelled in sets)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=classifier.model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=config.epochs,
                learning_rate=config.learning_rate,
                per_device_train_batch_size=config.train_batch_size,
                per_device_eval_batch_size=2 * config.train_batch_size,
                seed=config.seed,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=training,
            eval_dataset=validation,
            data_collator=DataCollatorWithPadding(classifier.tokenizer),
            compute_metrics=_accuracy,
            callbacks=[progress],
        )
        for printing in (PrinterCallback, ProgressCallback):  # they write to stdout
            trainer.remove_callback(printing)
        trainer.train()
    return Classifier(classifier.model.eval(), classifier.tokenizer), progress.accuracies


def _rows(classifier: Classifier, labelled: Labelled, max_length: int) -> Any:
    classes = classifier.classes
    order = class_order(labelled.names, classes) if labelled.names else range(len(classes))
    encoded = classifier.tokenizer(list(labelled.texts), truncation=True, max_length=max_length)
    check_token_ids(classifier.model, max(max(row, default=0) for row in encoded["input_ids"]))
    return [
        {**{name: encoded[name][row] for name in classifier.inputs}, "labels": order[label]}
        for row, label in enumerate(labelled.labels)
    ]


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _progress_callback() -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """A bar and a line per epoch, on stderr."""

        def __init__(self) -> None:
            self.accuracies: list[float] = []
            self._bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, control, kwargs
            self._bar = tqdm(total=state.max_steps, desc="fine-tune", unit="step", disable=None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control, kwargs
            self._bar.update()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, control
            accuracy = kwargs["metrics"]["eval_accuracy"]
            self.accuracies.append(accuracy)
            logger.info("epoch %d: validation accuracy %.4f", round(state.epoch), accuracy)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control, kwargs
            self._bar.close()

    return Progress()
