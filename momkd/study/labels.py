"""Labels of a study: what its options say of each task, and what is told of the tables before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from momkd.data.classes import LabelOptions
from momkd.data.ids import shared_note
from momkd.data.tables import Labels, read_labels
from momkd.errors import InputError
from momkd.study.cohort import StudyCohort


def task_options(
    tasks: Sequence[str],
    *,
    classes: Sequence[str] = (),
    positive: Sequence[str] = (),
    missing: Sequence[str] = (),
    case_from: str | None = None,
) -> dict[str, LabelOptions]:
    """The options of each task.

    Args:
        tasks: columns of the labels.
        classes, positive: "A,B" and "B", or of several tasks "TASK=A,B" and "TASK=B".
        missing, case_from: of all tasks, see `LabelOptions`.

    Raises:
        InputError: an option that names no task, where there are several, or one twice.
    """
    orders, positives = _by_task("--classes", classes, tasks), _by_task("--positive", positive, tasks)
    return {
        task: LabelOptions(
            tuple(name.strip() for name in orders[task].split(",")) if task in orders else None,
            positives.get(task),
            tuple(missing),
            case_from,
        )
        for task in tasks
    }


def _by_task(option: str, texts: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for text in texts:
        named = [task for task in tasks if text.startswith(f"{task}=")]
        if not named and len(tasks) > 1:
            raise InputError(
                f"{option}: expected LABEL=... for one of the labels {', '.join(tasks)}, got {text!r}; name the label"
            )
        task = max(named, key=len) if named else tasks[0]
        if task in values:
            raise InputError(f"{option}: expected one value for {task!r}, got also {text!r}; leave one out")
        values[task] = text.removeprefix(f"{task}=") if named else text
    return values


def read_task(cohort: StudyCohort, task: str, note: Callable[[str], None] | None = None) -> Labels:
    """The labels of a task, once those of the external cohort fit them; `note` is told what a user should know."""
    labels = read_labels(cohort.labels, label=task, options=cohort.options(task))
    told = [labels.summary(), *labels.notes]
    if cohort.external_labels is not None:
        external = read_labels(
            cohort.external_labels, label=task, classes=labels.classes, options=cohort.external_options(task)
        )
        told += [f"{external.source}: {external.summary()}", *external.notes]
        cases = labels.cases()
        told += shared_note(external.source, external.cases(), cases.keys(), set(cases.values()))
    if note is not None:
        for text in told:
            note(text)
    return labels
