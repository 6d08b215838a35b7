"""Room 3: GPT-2 as a program of tasks. It has never heard of schedulers. To be read in this order:

shape.py         sizes, batch, tiles, options: what a graph file says
grid.py          where tensors are cut, and which part of them a task takes
model.py         the tensors
program.py       a step as ordinary loops that spawn tasks; stored_updates.py, where gradients are stored and the norm is waited for
replicas.py      one of several ranks that train the same model: what they exchange, and when
steps.py         steps in one or more micro-batches, as a row of graphs
kernels.py       matrix products, GELU, residual, embeddings; norms.py, attention.py, classifier.py, gradients.py, updates.py the others
attention_strips.py  a head of attention in one pass, for products of our own
vector_math.py   sums and exponentials that the compiler can vectorize
learning_rate.py the learning rate of each step
snapshot.py      a copy of a model in training, made by tasks
sampling.py      text while training, as llm.c samples it
generation/      text from a trained model, with a key-value cache
checkpoints/     parameters in files: llm.c's, Hugging Face's, and a run's own to go on from
text/            tokens, tokenizers, datasets
"""
