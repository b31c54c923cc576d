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
from train.data import Prefetcher, micro_batches
from train.engine import Engine
from train.folders import name_of
from train.guard import Guard
from train.job import Job, begin, where
from train.journal import Journal
from train.objective import Objective
from train.ranks import Alarm, Ranks, Sigterm, Stopped
from train.run import Late
from train.validation import Patience


def fit(job: Job, objective: Objective, ranks: Ranks) -> str:
    """Train to the end from the job's checkpoint, or from the start; returns the last checkpoint's URL.

    Collective. Raises Stopped after SIGTERM, StageError on all ranks alike where training cannot go on.
    """
    config = job.config
    last, found, run = where(job)
    if last and (run.finished or run.images >= config.images):
        return last
    micro, accumulation, flops = begin(job, objective, ranks, run.images, fresh=last is None)
    guard, late = Guard(config.spike_sigmas, ranks.device, found.get("guard")), Late(ranks.device)
    patience = Patience(job.validator, found.get("patience"))
    with (
        Engine(config, objective, ranks, micro, accumulation) as engine,
        checkpoint.Saver(job.checkpoints, engine, job.keep, ranks) as saver,
        Journal(job, ranks, objective, run.images, engine.precision, flops) as journal,
        Prefetcher(micro_batches(objective, config, ranks, run.images), config.prefetch, ranks.device) as prefetcher,
        Sigterm() as sigterm,
        Alarm(config.hang_s, job.logs, ranks) as alarm,
    ):
        if last:
            checkpoint.load(last, found, engine)
        while not run.finished and run.images < config.images:
            alarm.again()
            # ---- gradients of the global batch ----------------------------------------------------------
            for part in range(accumulation):
                torch.manual_seed(job.dropout_seed(run.images, part, ranks.rank))
                engine.backward(next(prefetcher))

            # ---- the step, or a veto: decided on the device, alike on all ranks -------------------------
            engine.rates(*run.rates(config, objective.beside_from))
            outcome = engine.step(guard, sigterm.asked, saver.error is not None)
            run.step, run.images = run.step + 1, run.images + config.batch_size
            ends = run.images >= config.images
            validates = job.validator and (ends or run.crossed(job.validator.every_images, config))
            saves = ends or run.crossed(config.checkpoint_every_images, config)

            # ---- what became of the step before, and of this one where something is due -----------------
            for result in late.read(outcome, run, engine.rate, everything=bool(saves or validates)):
                if run.exhausted(config.max_skips):
                    break
                run.count(result, objective.beside_from)
                journal.step(result, prefetcher.waited)
                if not (result.applied or result.overflow):
                    journal.skipped(result, run, guard, objective)
                if result.unsaved:
                    saver.finish()  # raises
            if run.exhausted(config.max_skips):
                saver.finish()
                back = checkpoint.newest(job.checkpoints, ranks, sound=True)
                folder, manifest = run.roll_back(job.stage, back, config.max_rollbacks, journal.events)  # or raises
                checkpoint.load(folder, manifest, engine)
                guard.forget()
                late.forget()  # the newest step was taken from weights that are gone
                patience = Patience(job.validator, manifest.get("patience"))  # and so were validations since
                journal.event(run.images, "rollback", checkpoint=name_of(folder), rollbacks=run.rollbacks)
                saves, validates = True, validates and ends  # nothing was learned that patience could wait for

            # ---- what a person sees, and what outlives this process -------------------------------------
            alarm.again()
            if validates and job.validator:
                with journal.pause(), engine.using("ema"):
                    loss = job.validator.measure(engine, ranks)
                journal.event(run.images, "validation", loss=loss)
                run.finished = patience.over(loss, run.step)
                saves = saves or patience.best_step == run.step
            if saves or late.stop or run.finished:
                with journal.saving(run.images):
                    last = saver.save(run.step, job.manifest(objective, run, engine, guard, patience))
                if job.samples:
                    with journal.pause(), engine.using("ema"):
                        journal.grid(run.images, job.samples.draw(engine.cast))
            if late.stop and not (run.finished or ends):
                saver.finish()
                raise Stopped(f"{job.stage}: stopped by SIGTERM at {run.images} images; the checkpoint is {last}")
        saver.finish()
    assert last is not None
    return last
