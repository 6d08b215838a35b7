"""What GPT-2 reads and writes: text, tokens, datasets.

tokenizer.py   text to ids and back: GPT-2's encoding, bytes, llm.c's tokenizer files
tokens.py      token files, and batches of them
mixtures.py    batches of several sources, mixed by weight
datasets.py    tinyshakespeare and TinyStories: download, tokenize, keep
documents.py   documents of texts, JSONL and Parquet, in spans
preparation.py token files of any texts: in parallel, in shards, to go on with
choices.py     multiple choice: llm.c's evaluation files
data.py        what a run trains on, opened by one word
kinds.py       what a file is, told by how it begins
"""
