"""What a task lacks is refused here."""

from looplab.runs.folder import Run


def refuse_hop_options(run: Run, max_loops: int | None, max_hops: int | None) -> None:
    for option, value in {"--max-loops": max_loops, "--max-hops": max_hops}.items():
        if value is not None:
            raise ValueError(
                f"{option} is for tasks with hops, and {run.folder} is a run on {run.task()}: leave it out."
            )


def refuse_masked(run: Run, masked: int | None) -> None:
    if masked is not None:
        raise ValueError(f"--masked is for molecules, and {run.folder} is a run on {run.task()}: leave it out.")
