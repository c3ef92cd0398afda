"""Plans as text."""

from collections.abc import Iterator, Sequence

from lacuna.preflight.plan import RunPlan
from lacuna.words import gib

SHOWN = 20
"""Runs of an experiment that get a line of their own."""


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `11 days`"""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def show(plan: RunPlan) -> Iterator[str]:
    """The lines of one plan."""
    devices = f"{plan.processes} × {plan.device}" if plan.processes > 1 else plan.device
    each = " each" if plan.processes > 1 else ""
    room = f" ({gib(plan.device_memory)}{each})" if plan.device_memory is not None else ""
    yield f"{plan.name}: {plan.trainer} of {plan.model} on {devices}{room}"
    if plan.parameters is not None and plan.trained is not None:
        share = "all" if plan.trained == plan.parameters else f"{plan.trained:,} ({plan.trained / plan.parameters:.2%})"
        yield f"  parameters  {plan.parameters:,}, trained: {share}"
    if plan.memory is not None and plan.peak is not None:
        verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit is known"}[plan.fits]
        if plan.device_memory is None:
            verdict = "of the host"
        yield f"  memory      {gib(plan.peak)} at the peak of a step: {verdict}"
        parts = sorted(plan.memory.items(), key=lambda part: -part[1])
        yield "              " + ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= 2**20 / 10)
        yield f"              activation checkpointing {'on' if plan.checkpointing else 'off'}"
    if plan.host is not None:
        yield f"  host        {gib(plan.host)} while it loads or saves"
    if plan.data is not None:
        yield f"  data        {_data(plan)}"
    if plan.not_counted is not None:
        yield f"  data        not counted: {plan.not_counted}"
    if plan.steps is not None:
        tokens = f", {plan.tokens:,.0f} tokens" if plan.tokens is not None else ""
        yield f"  steps       {plan.steps:,}{tokens}"
    yield from _time(plan)
    if plan.checkpoint is not None and plan.disk is not None:
        yield f"  disk        {gib(plan.disk)} at the most; a checkpoint {gib(plan.checkpoint)}"
    yield from (f"  advice      {text}" for text in plan.advice)
    yield from (f"  note        {text}" for text in plan.notes)


def _data(plan: RunPlan) -> str:
    counts = plan.data or {}
    documents = counts.get("documents", counts.get("samples", 0))
    rows = f", {counts['rows']:,} rows" if counts["rows"] != documents else ""
    fill = f" ({counts['fill']:.1%} full)" if counts.get("fill") is not None else ""
    learned = counts.get("targets", counts.get("learned", 0)) / max(counts["tokens"], 1)
    text = f"{documents:,} documents, {counts['tokens']:,} tokens ({learned:.0%} learned){rows}{fill}"
    left_out = {name: counts.get(name, 0) for name in ("dropped", "truncated", "empty")}
    said = [f"{number:,} {name}" for name, number in left_out.items() if number]
    held = [f"{counts['validation_documents']:,} to validate"] if counts.get("validation_documents") else []
    return ", ".join([text, *said, *held])


def _time(plan: RunPlan) -> Iterator[str]:
    if plan.flops is None or plan.speed is None:
        return
    mfu = plan.speed.mfu
    rate = f"MFU {mfu:.0%}" if mfu is not None else f"{plan.speed.tokens_per_second:,.0f} tokens/s"
    if plan.seconds is None:
        yield f"  time        {plan.flops:.2e} FLOPs; not known for {plan.device}, whose peak is not"
        return
    hours = f", {plan.gpu_hours:.2f} GPU-hours" if plan.processes > 1 and plan.gpu_hours is not None else ""
    yield f"  time        {duration(plan.seconds)}{hours}: {plan.flops:.2e} FLOPs, {rate} ({plan.speed.source})"


def show_all(name: str, plans: Sequence[RunPlan]) -> Iterator[str]:
    """The lines of an experiment: its runs, those that do not fit, and the sums."""
    yield f"{name}: {len(plans)} runs, {plans[0].trainer}, on {plans[0].device}"
    refused = [plan for plan in plans if plan.fits is False]
    shown = list(dict.fromkeys([*(plan.name for plan in plans[:SHOWN]), *(plan.name for plan in refused[:SHOWN])]))
    yield f"  {'run':10}  {'memory':>10}  {'steps':>8}  {'tokens':>14}  {'time':>9}  {'disk':>10}"
    for plan in plans:
        if plan.name in shown:
            yield _row(plan)
    if len(plans) > len(shown):
        yield f"  … and {len(plans) - len(shown)} more"
    yield from _sums(plans)
    if refused:
        yield f"  DO NOT FIT  {len(refused)} of {len(plans)}: {', '.join(plan.name for plan in refused[:SHOWN])}"
    for kind, texts in (("advice", _common(plans, "advice")), ("note", _common(plans, "notes"))):
        yield from (f"  {kind:6}      {text}" for text in texts)


def _row(plan: RunPlan) -> str:
    cells = (
        gib(plan.peak) if plan.peak is not None else "?",
        f"{plan.steps:,}" if plan.steps is not None else "?",
        f"{plan.tokens:,.0f}" if plan.tokens is not None else "?",
        duration(plan.seconds) if plan.seconds is not None else "?",
        gib(plan.disk) if plan.disk is not None else "?",
    )
    mark = "" if plan.fits is not False else "  does not fit"
    return "  {:10}  {:>10}  {:>8}  {:>14}  {:>9}  {:>10}".format(plan.name, *cells) + mark


def _sums(plans: Sequence[RunPlan]) -> Iterator[str]:
    hours = [plan.gpu_hours for plan in plans if plan.gpu_hours is not None]
    tokens = [plan.tokens for plan in plans if plan.tokens is not None]
    disk = [plan.disk for plan in plans if plan.disk is not None]
    parts = []
    if len(hours) == len(plans):
        parts.append(f"{sum(hours):,.1f} GPU-hours")
    if len(tokens) == len(plans):
        parts.append(f"{sum(tokens):,.0f} tokens")
    if len(disk) == len(plans):
        parts.append(f"{gib(sum(disk))} of disk")
    if parts:
        yield f"  all         {', '.join(parts)}"


def _common(plans: Sequence[RunPlan], field: str) -> list[str]:
    """What plans say, each once, with the number of runs that it holds for."""
    said: dict[str, int] = {}
    for plan in plans:
        for text in plan.advice if field == "advice" else [*plan.notes, *filter(None, [plan.not_counted])]:
            said[text] = said.get(text, 0) + 1
    return [text if number == len(plans) else f"{text} ({number} runs)" for text, number in list(said.items())[:SHOWN]]
