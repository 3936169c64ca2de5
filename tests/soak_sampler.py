"""Kills a loading run again and again, at random moments and with changing numbers of ranks, and audits what it drew.

    python tests/soak_sampler.py --kills 200

A host process plays all ranks of a run: each has its own Loader with its own process, writes audit rows as training
does, and every few steps the host saves the step, as a checkpoint would. It is killed with SIGKILL, or one of its
loader processes is; the next attempt continues from the saved step with another number of ranks. After every attempt
the audit must prove exactly-once, and every step that was drawn twice must have had the same pixels, ids and draws.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

LANES, WORLDS = 24, (1, 2, 3, 4, 6, 8)
SAVE_EVERY, EPOCHS = 7, 2
SOURCES = (("small", 500, 1), ("large", 6000, "1/2"))


def main() -> int:
    """The driver: starts hosts, kills them, audits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak_sampler"))
    parser.add_argument("--host", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        run, world, attempt, seed = options.host
        return host(Path(run), world=int(world), attempt=int(attempt), seed=int(seed))
    return drive(options.out, kills=options.kills, random=random.Random(options.seed))


def drive(out: Path, *, kills: int, random: random.Random) -> int:
    """Runs until so many kills have been survived; returns the exit status."""
    from m3i_large.data.audit import audit_runs

    shutil.rmtree(out, ignore_errors=True)
    write_data(out / "data")
    done, finished, attempt, run, worlds, kinds = 0, 0, 0, out / "run_0", Counter(), Counter()
    began = time.monotonic()
    while done < kills or attempt:
        world = random.choice(WORLDS)
        how = random.choice(("host", "host", "loader")) if done < kills else "none"
        code = one_attempt(run, world=world, attempt=attempt, seed=finished, how=how, random=random)
        worlds[world] += 1
        audit = audit_runs([run])
        if not audit.proven and audit.steps:  # without a complete step there is nothing to prove
            print(audit.to_text())
            return 1
        check_digests(run)
        if code == 0:
            counts = ", ".join(f"{s.name} {s.epochs_finished} epochs" for s in audit.sources)
            print(f"{run}: {audit.steps} steps in {attempt + 1} attempts: proven ({counts})", flush=True)
            finished, attempt = finished + 1, 0
            run = out / f"run_{finished}"
            continue
        done, attempt = done + 1, attempt + 1
        kinds[how] += 1
    spread = ", ".join(f"{n} of {w}" for w, n in sorted(worlds.items()))
    print(
        f"{done} kills ({', '.join(f'{n} {k}' for k, n in kinds.items())}), {finished} runs finished, "
        f"attempts by ranks: {spread}; all audits proven, all repeated steps the same; {time.monotonic() - began:.0f} s"
    )
    return 0


def one_attempt(run: Path, *, world: int, attempt: int, seed: int, how: str, random: random.Random) -> int:
    """Starts a host and kills it, or one of its loader processes, after a while; returns its exit status."""
    arguments = [run, world, attempt, seed]
    with subprocess.Popen(
        [sys.executable, __file__, "--host", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as process:
        if how != "none":
            first = run / f"audit/attempt_{attempt}_rank_0_of_{world}.jsonl"
            while process.poll() is None and not first.exists():
                time.sleep(0.01)
            time.sleep(random.expovariate(1.5))
            victim = process.pid if how == "host" else random.choice(children(process.pid) or [process.pid])
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
        message = process.communicate(timeout=300)[1]
    if process.returncode not in (0, -9, 3):
        raise AssertionError(f"{run} attempt {attempt} ({how}): status {process.returncode}: {message}")
    return process.returncode


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def check_digests(run: Path) -> None:
    """Every step has one digest, whatever attempt and number of ranks drew it."""
    seen: dict[int, str] = {}
    for path in sorted(run.glob("digests_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step, digest = json.loads(line)
            except ValueError:
                continue  # cut by a kill
            if seen.setdefault(step, digest) != digest:
                raise AssertionError(f"{path}: step {step} differs from an earlier attempt's")


def write_data(root: Path) -> None:
    """Two sources of small pictures; one in twenty of the small one is damaged."""
    import cv2
    import numpy as np
    import webdataset as wds

    root.mkdir(parents=True)
    for name, count, _ in SOURCES:
        for shard in range(3):
            with wds.TarWriter(str(root / f"{name}-{shard}.tar")) as writer:
                for i in range(shard, count, 3):
                    image = np.full((18, 20, 3), (i % 256, i // 256 * 9, 77), np.uint8)
                    data = cv2.imencode(".png", image)[1].tobytes()
                    data = data[:50] if name == "small" and i % 20 == 0 else data
                    writer.write({"__key__": f"{i:05d}", "png": data, "txt": f"number {i}"})


def host(run: Path, *, world: int, attempt: int, seed: int) -> int:
    """Plays all ranks of one attempt; status 3 where a loader fails with an outage."""
    from m3i_large.data.config import BadSampleBudget, DataConfig
    from m3i_large.data.loader import Loader
    from m3i_large.data.mixture import Mixture
    from m3i_large.data.producer import LoaderJob
    from m3i_large.data.source_config import SourceConfig
    from m3i_large.data.sources import open_sources
    from m3i_large.data.views import MaskSpec
    from m3i_large.errors import OutageError
    from m3i_large.metrics import append_row

    data = run.parent / "data"
    configs = [
        SourceConfig(name=name, kind="image_text", shards=f"{name}-*.tar", repeats=repeats)
        for name, _, repeats in SOURCES
    ]
    read = ("sample", "block")[(seed + attempt) % 2]
    config = DataConfig(
        root=str(data), sources=configs, image_size=16, threads=1, io_threads=2, read=read,
        bad_samples=BadSampleBudget(share=0.2, window=1000),
    )  # fmt: skip
    sources = open_sources(configs, data)
    specs = [(s.name, s.num_samples, c.exact_repeats, 60_000, None) for s, c in zip(sources, configs, strict=True)]
    mixture = Mixture.plan(seed, sources=specs, global_batch=4 * LANES, lanes=LANES, window_steps=8)
    (run / "audit").mkdir(parents=True, exist_ok=True)
    saved = run / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    named = [{"name": s.name, "samples": s.num_samples} for s in sources]
    event = {"event": "resume" if start else "start", "step": start, "world": world, "attempt": attempt}
    append_row(run / "events.jsonl", event | {"sources": named})
    loaders = []
    for rank in range(world):
        job = LoaderJob(
            config=config, mixture=mixture, sources=sources, context_length=8, seed=seed,
            mask=MaskSpec(cells=4, ratio=0.5), rank=rank, world=world, accumulation=1,
        )  # fmt: skip
        loaders.append(Loader(job, start_step=start))
    steps = mixture.steps_for_epochs(EPOCHS)
    try:
        for step in range(start, steps):
            digest = 0
            for rank, loader in enumerate(loaders):
                batch = next(loader)
                columns = (batch.source_N, batch.epoch_N, batch.id_N, batch.substitute_N)
                samples = [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
                name = f"attempt_{attempt}_rank_{rank}_of_{world}.jsonl"
                append_row(run / "audit" / name, {"step": step, "micro_step": 0, "samples": samples})
                # Rows of all ranks in order are the global batch in its canonical order, at any number of ranks.
                for row in range(len(batch)):
                    for field in ("target_NHWC", "other_NHWC", "colour_NV34", "mask_NPP", "text_NT", "id_N"):
                        digest = zlib.crc32(getattr(batch, field)[row].contiguous().numpy().tobytes(), digest)
            with (run / f"digests_{attempt}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps([step, digest]) + "\n")
            if (step + 1) % SAVE_EVERY == 0:
                temporary = run / ".step.tmp"
                temporary.write_text(str(step + 1))
                temporary.replace(saved)
    except OutageError as error:
        print(error, file=sys.stderr)
        return 3
    append_row(run / "events.jsonl", {"event": "end", "step": steps, "attempt": attempt, "outcome": "finished"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
