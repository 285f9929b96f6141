"""Log effective learning rates, angular updates and gradient noise from a transformers Trainer to TensorBoard."""

import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import normkern
from normkern.integrations import HuggingFaceCallback

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))
texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (128, 16))]
optimizer = normkern.SGD(model.parameters(), lr=0.1, momentum=0.9, stats="tensor")

os.environ["TENSORBOARD_LOGGING_DIR"] = "runs/transformers"
arguments = TrainingArguments(
    output_dir="runs/transformers",
    num_train_epochs=2,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    report_to=["tensorboard"],  # or "wandb"
    save_strategy="no",
    use_cpu=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=texts, optimizers=(optimizer, None))
trainer.add_callback(HuggingFaceCallback(trainer, every=4, noise_every=8))
trainer.train()
print("steps:", trainer.state.global_step)
