"""Text from a trained model: a token at a time, with a key-value cache, as graphs of tasks.

products.py     products of few rows with a matrix, at the speed of the memory
kernels.py      what the tasks do, on rows that may be of any sequence and at any position
decoder.py      parameters, cache and activations; the two graphs, recorded once: rows into the cache, and the logits of the next tokens
next_token.py   temperature, top-k, top-p, repetition penalty, and the draw
generate.py     sequences that share a decoder, from prompt to end
text_stream.py  bytes of tokens to text as they come, up to a stop string
"""
