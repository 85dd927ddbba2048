"""The fused contrastive loss in a SentenceTransformerTrainer: no matrix of all scores, so batches can be large.

python examples/sentence_transformers_loss.py [MODEL]     MODEL: a base, a run or an export (smollm2-135m-instruct)

STEPS: optimizer steps (default 20).
"""

import os
import sys
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers

from l2v import Encoder
from l2v.data import sample
from l2v_kernels.integrations.sentence_transformers import FusedMultipleNegativesRankingLoss

STEPS = int(os.environ.get("STEPS", "20"))


def pairs() -> Dataset:
    """Questions of the Danish sample and the passages that answer them."""
    passages = sample.passages()
    rows = [{"anchor": q.query, "positive": passages[q.positive].text} for q in sample.questions("train")]
    return Dataset.from_list(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
        Encoder.from_pretrained(name, length=64, precision="fp32").save(f"{folder}/encoder")
        model = SentenceTransformer(f"{folder}/encoder")
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-4, logging_steps=1,
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # equal texts in one batch would count as negatives
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        loss = FusedMultipleNegativesRankingLoss(model, scale=20.0)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs(), loss=loss)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
