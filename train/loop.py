"""The training loop: one for all objectives, on DeepSpeed, on any number of ranks.

    while images < total:
        gradients of the global batch -> step, or a veto -> what became of the step before -> validate, save

It is launched by one of these (main.py says more); killed at any moment, the same line goes on:

    deepspeed train/main.py --config mine.yaml                                one machine
    deepspeed --hostfile hosts train/main.py --config mine.yaml               several, by pdsh
    deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr node1 train/main.py --config mine.yaml
                                                                              several, the line on each
    carrara train --config mine.yaml                                          on Ray

The clock is in images. A checkpoint's tensors and a few numbers are all that is needed to go on: order, noise, rates
and EMA lengths are functions of the position. Nothing in a step waits for the device: what it decides, it decides
there, and the host reads what a step came to while the next one runs.
"""

from __future__ import annotations

import torch

from train import checkpoint
from train.data import Ahead, micro_batches
from train.engine import Engine
from train.folders import name_of
from train.guard import Guard
from train.job import Job, begin
from train.journal import Journal
from train.objective import Objective
from train.ranks import Alarm, Ranks, Sigterm, Stopped
from train.run import Late, Run, crossed
from train.validation import Patience


def fit(job: Job, objective: Objective, ranks: Ranks) -> str:
    """Train to the end from the newest complete checkpoint, or from the start; returns the last checkpoint's URL.

    Collective. Raises Stopped after SIGTERM, StageError on all ranks alike where training cannot go on.
    """
    config, batch = job.config, job.config.batch_size
    last, found = checkpoint.newest(job.checkpoints, ranks) or (None, {})
    run = Run.of(found) if found else Run()
    # A run that had ended early goes on where it was made longer.
    run.finished = run.finished and found["config"]["images"] == config.images
    if last and (run.finished or run.images >= config.images):
        return last
    micro, accumulation, flops = begin(job, objective, ranks, run.images, fresh=last is None)
    engine = Engine(config, objective, ranks, micro, accumulation)
    if last:
        checkpoint.load(last, found, engine)
        engine.load_scaling(found.get("loss_scale"))
    guard = Guard(config.spike_sigmas, ranks.device, found.get("guard"))
    patience = Patience(job.validator.patience if job.validator else None, found.get("patience"))
    journal = Journal(job, ranks, objective, run.images, engine.precision, flops)
    saver = checkpoint.Saver(job.checkpoints, engine, job.keep, ranks)
    late, state = Late(ranks.device), "failed"
    for note in job.notes:
        journal.event(run.images, "order", note=note)

    def save() -> str:
        kept = {"guard": guard.state(), "patience": patience.state(), "loss_scale": engine.scaling()}
        return saver.save(run.step, {**job.manifest(objective, run, engine.precision), **kept})

    try:
        with (
            Ahead(micro_batches(objective, config, ranks, run.images), config.prefetch, ranks.device) as ahead,
            Sigterm() as sigterm,
            Alarm(config.hang_s, job.logs, ranks) as alarm,
        ):
            while not run.finished and run.images < config.images:
                alarm.again()
                # ---- gradients of the global batch ------------------------------------------------------
                for part in range(accumulation):
                    torch.manual_seed(job.dropout_seed(run.images, part, ranks.rank))
                    engine.backward(next(ahead))

                # ---- the step, or a veto: decided on the device, alike on all ranks ---------------------
                rate, decays = run.rates(config)
                engine.rates(rate, decays)
                outcome = engine.step(guard, sigterm.asked, saver.error is not None)
                run.step, run.images = run.step + 1, run.images + batch
                ends = run.images >= config.images
                validates = job.validator and (ends or crossed(run.images, batch, job.validator.every_images))
                saves = ends or crossed(run.images, batch, config.checkpoint_every_images)

                # ---- what became of the step before, and of this one where something is due -------------
                for told in late.read(outcome, run.step, run.images, rate, bool(saves or validates)):
                    if run.exhausted(config.max_skips):
                        break
                    run.count(told)
                    journal.step(told, ahead.waited)
                    if not (told.applied or told.overflow):
                        journal.skipped(told, run, guard, objective)
                    if told.unsaved:
                        saver.finish()  # raises
                if run.exhausted(config.max_skips):
                    saver.finish()
                    back = checkpoint.newest(job.checkpoints, ranks)
                    run.roll_back(job.stage, back and back[1], config.max_rollbacks, journal.events)  # or raises
                    assert back is not None
                    checkpoint.load(*back, engine)
                    guard.forget()
                    late.forget()  # the newest step was taken from weights that are gone
                    journal.event(run.images, "rollback", checkpoint=name_of(back[0]), rollbacks=run.rollbacks)
                    saves = True

                # ---- what a person sees, and what outlives this process ---------------------------------
                if validates and job.validator:
                    with journal.pause(), engine.using("ema"):
                        loss = job.validator.measure(engine, ranks)
                    journal.event(run.images, "validation", loss=loss)
                    run.finished = patience.over(loss, run.images)
                if saves or late.stop or run.finished:
                    with journal.pause():
                        last = save()
                        if job.samples:
                            with engine.using("ema"):
                                pictures = job.samples.draw(engine.cast)
                            journal.grid(run.images, pictures)
                if late.stop and not (run.finished or ends):
                    saver.finish()
                    state = "stopped"
                    raise Stopped(f"{job.stage}: stopped by SIGTERM at {run.images} images; the checkpoint is {last}")
            saver.finish()
        state = "done"
        assert last is not None
        return last
    finally:
        saver.wait()
        journal.close(state)
        engine.destroy()
