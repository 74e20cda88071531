"""The rollouts of a run on the terminal: a line per step, or the samples of one group."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from orbit_core.errors import InputError
from orbit_core.store import open_store
from orbit_core.store.compaction import compact
from orbit_core.store.rollouts import RolloutReader, list_runs

METRICS = {  # of a commit -> what the column is called
    "reward_mean": "reward",
    "accuracy": "accuracy",
    "response_length_mean": "tokens",
    "kl": "KL",
    "logprob_gap_mean": "gap",
    "max_orthogonality_error": "|RR'-I|",
}

GROUP_COLUMNS = (
    "sample_index",
    "prompt",
    "label",
    "response",
    "response_token_ids",
    "reward",
    "advantage",
    "finish_reason",
)


def find_run(store: str, run: str) -> RolloutReader:
    """The run whose id begins with `run`; InputError lists the runs of the store if there is not exactly one."""
    opened = open_store(store)
    runs = list_runs(opened)
    matching = [each for each in runs if each == run] or [each for each in runs if each.startswith(run)]
    if len(matching) != 1:
        raise InputError(
            f"run {run}",
            f"the id of a run in store {store}, or its beginning",
            f"{len(matching)} runs of that name; there are: {', '.join(runs) or 'none'}",
        )
    return RolloutReader(opened, matching[0])


def show_runs(store: str, console: Console) -> None:
    """The runs of a store: how far each is and what its last step earned."""
    opened = open_store(store)
    table = Table("run", *_right("steps", "reward", "accuracy"), box=None, pad_edge=False)
    for run in list_runs(opened):
        reader = RolloutReader(opened, run)
        last = reader.commit(len(reader.steps()) - 1)
        figures = (f"{last.metrics[name]:.3g}" if name in last.metrics else "" for name in ("reward_mean", "accuracy"))
        table.add_row(run, str(last.step + 1), *figures)
    console.print(table if table.row_count else f"no runs in store {store}")


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def show_steps(reader: RolloutReader, last: int, console: Console) -> None:
    """The last `last` committed steps (0: all) with their counts and metrics; no row is read, nor another step."""
    steps = reader.steps()
    shown_steps = steps[-last:]
    commits = list(reader.commits(shown_steps))
    shown = [name for name in METRICS if any(name in commit.metrics for commit in commits)]
    rows = [["step", "rows", "adapter", *(METRICS[name] for name in shown)]]
    for commit in commits:
        figures = (f"{commit.metrics[name]:.3g}" if name in commit.metrics else "" for name in shown)
        rows.append([str(commit.step), str(commit.rows), commit.adapter_digest[:12], *figures])
    # Not a rich table: that takes more than a millisecond for each line, and a long run has ten thousand.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    lines = [f"run {reader.run}", f"files {reader.glob}"]
    if len(shown_steps) < len(steps):
        lines.append(f"the last {len(shown_steps)} of {len(steps)} steps; --last 0 shows all")
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)


def show_groups(reader: RolloutReader, step: int, console: Console) -> None:
    """The groups of one step: prompt, rewards, whether they were trained on."""
    rows = reader.rows(step, ["group_index", "prompt", "reward", "trained"]).to_pylist()
    groups: dict[int, list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(row["group_index"], []).append(row)
    table = Table("group", "samples", "reward mean", "trained", "prompt", box=None, pad_edge=False)
    for group, samples in sorted(groups.items()):
        mean = sum(float(str(row["reward"])) for row in samples) / len(samples)
        trained = sum(bool(row["trained"]) for row in samples)
        prompt = _one_line(str(samples[0]["prompt"]))
        table.add_row(str(group), str(len(samples)), f"{mean:.3f}", f"{trained}/{len(samples)}", Text(prompt))
    console.print(table)


def show_group(reader: RolloutReader, step: int, group: int, console: Console) -> None:
    """The samples of one group of one step."""
    rows = reader.rows(step, GROUP_COLUMNS, group).to_pylist()
    if not rows:
        raise InputError(f"run {reader.run}, step {step}", "one of its groups", f"no group {group}")
    console.print(Text(f"prompt    {_one_line(rows[0]['prompt'])}\nlabel     {rows[0]['label']}\n"), soft_wrap=True)
    table = Table("sample", "reward", "advantage", "tokens", "ended", "response", box=None, pad_edge=False)
    for row in sorted(rows, key=lambda row: row["sample_index"]):
        table.add_row(
            str(row["sample_index"]),
            f"{row['reward']:.3f}",
            f"{row['advantage']:+.3f}",
            str(len(row["response_token_ids"])),
            row["finish_reason"],
            Text(_one_line(row["response"], 2000)),
        )
    console.print(table)


def compact_run(reader: RolloutReader, console: Console) -> None:
    """Compact the run's whole blocks of steps, one line for each that was not."""

    def say(block: range, made: bool) -> None:
        if made:
            console.print(f"steps {block.start} to {block.stop - 1}")

    made = compact(reader.store, reader.run, say)
    blocks = reader.compacted_blocks()
    covered, left = blocks[-1].stop if blocks else 0, len(reader.steps())
    text = f"{made} blocks compacted; {covered} of {left} steps are, the rest when their block is full"
    files = reader.store.url_of(f"compacted/run={reader.run}/*.parquet") if covered else reader.glob
    console.print(Text(f"{text}\nfiles {files}"), soft_wrap=True)


def _one_line(text: str, limit: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
