"""Trains the bundled language model on the reviews that `rlhf_bayes.toy.generate` writes: six minutes on one core.

    python -m rlhf_bayes.toy.train_lm

A Llama of 0.5 M parameters over a byte-level BPE, so that any text encodes. No BOS; each sentence ends with EOS.
"""

import argparse
import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_bayes.toy import model_path
from rlhf_bayes.toy.generate import write_reviews

PAD, EOS = "<pad>", "<eos>"
MAX_LENGTH = 128


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with separate pad and EOS tokens, padded on the left as generation needs it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=MAX_LENGTH
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The bundled model before training: a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]  a union in transformers
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    return LlamaForCausalLM(config)


def batch_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Mean negative log-likelihood per token of the texts with their EOS. Nats; scalar."""
    batch = tokenizer([text + EOS for text in texts], return_tensors="pt", padding=True, padding_side="right")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # (B, T, V)
    labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)  # (B, T)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(steps: int, batch_size: int, learning_rate: float, vocab_size: int, seed: int):
    """
    Train a tokenizer and a model, with new reviews in every batch; returns both.

    Args:
        steps (`int`): Number of optimizer steps.
        batch_size (`int`): Reviews in each batch.
        learning_rate (`float`): Learning rate at the start.
        vocab_size (`int`): Number of tokens.
        seed (`int`): Seed of the reviews and of the weights.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # Adam's second moments of unused tokens become denormal, which is slow
    texts = [review.text for review in write_reviews(steps * batch_size, seed)]
    tokenizer = train_tokenizer(texts[:20_000], vocab_size)
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) + 0.01),
    )
    progress = tqdm(range(steps), desc="training the toy LM")
    for step in progress:
        loss = batch_loss(model, tokenizer, texts[step * batch_size : (step + 1) * batch_size])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(nats_per_token=f"{loss.item():.3f}")
    return model, tokenizer


def main() -> None:
    """Train the bundled model: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=model_path(), help="Where the model goes; the default replaces it.")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--vocab_size", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = train(args.steps, args.batch_size, args.learning_rate, args.vocab_size, args.seed)

    model.eval()
    held_out = [review.text for review in write_reviews(2_000, args.seed + 1)]
    with torch.no_grad():
        print(f"held-out loss: {batch_loss(model, tokenizer, held_out).item():.3f} nats a token")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved in {args.output_dir}")


if __name__ == "__main__":
    main()
