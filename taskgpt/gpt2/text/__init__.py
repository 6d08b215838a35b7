"""What GPT-2 reads and writes: text, tokens, datasets.

tokenizer.py   text to ids and back: GPT-2's encoding, bytes, llm.c's tokenizer files
tokens.py      token files, and batches of them
mixtures.py    batches of several sources, mixed by weight
datasets.py    tinyshakespeare and TinyStories: download, tokenize, keep
data.py        what a run trains on, opened by one word
kinds.py       what a file is, told by how it begins
"""
