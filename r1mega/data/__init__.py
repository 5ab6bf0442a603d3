"""Data: tokenizer, Megatron ``.bin/.idx`` files, sample order, microbatches of a rank."""
