"""The verbs of `taskgpt`, a file each, but for train, which is in taskgpt/train.py; and the grammar of their flags, arguments.py."""
