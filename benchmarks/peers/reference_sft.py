"""The hand-written loop's side of benchmarks/sft.py. stock: whole rows, as many as the peers'; best: filled up to their tokens."""

from __future__ import annotations

import torch

from benchmarks import reference_loop
from benchmarks.peers.job import StepLog, read_job


def main() -> None:
    job = read_job()
    log = StepLog(job)
    torch.manual_seed(job.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = reference_loop.Model(job.model, getattr(torch, job.precision), job.rank, job.alpha, device)
    rows = reference_loop.tokenise(job.model, job.read_rows(), job.max_length)
    budget = job.batch_size * job.max_length if job.best else None
    source = reference_loop.batches(rows, job.batch_size, budget, model.device)
    log.begin()
    reference_loop.train(
        model, source, job.steps, job.learning_rate, lambda batch, loss: log.step(len(batch.ids), len(batch.targets), loss)
    )
    log.end("transformers")


if __name__ == "__main__":
    main()
