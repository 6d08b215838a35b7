"""A binary heap of instances in the order of their keys. For whoever holds the queue's lock."""

from taskgpt.pointers import store, words_at
from taskgpt.schedulers.native.table import INSTANCES, KEYS, SIZE, compiled


@compiled
def insert(queue, key, instance):
    _sift_up(words_at(queue[KEYS]), words_at(queue[INSTANCES]), queue[SIZE], key, instance)
    store(queue, SIZE, queue[SIZE] + 1)


@compiled
def remove(queue, at):
    """Return the instance at a place of the heap, 0 for the one of the lowest key, and take it out."""
    keys, instances, size = words_at(queue[KEYS]), words_at(queue[INSTANCES]), queue[SIZE] - 1
    instance = instances[at]
    key, moved = keys[size], instances[size]
    if at < size:
        if at > 0 and keys[(at - 1) >> 1] > key:
            _sift_up(keys, instances, at, key, moved)
        else:
            _sift_down(keys, instances, at, size, key, moved)
    store(queue, SIZE, size)
    return instance


@compiled
def _sift_up(keys, instances, at, key, instance):
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] <= key:
            break
        keys[at], instances[at] = keys[parent], instances[parent]
        at = parent
    keys[at], instances[at] = key, instance


@compiled
def _sift_down(keys, instances, at, size, key, instance):
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if key <= keys[child]:
            break
        keys[at], instances[at] = keys[child], instances[child]
        at = child
    keys[at], instances[at] = key, instance
