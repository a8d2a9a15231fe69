"""A sample of a text stream as text."""

import torch


def read(stream, data, position):
    """Prompt, label and answers to choose from of one sample, as text."""
    inputs, labels = data.batch(torch.tensor([position]))
    prompt = stream.tokenizer.decode([i for i in inputs[0, 0].tolist() if i >= 0])
    named = [stream.class_names[i] for i in inputs[0, 1].tolist() if i >= 0]
    return prompt, stream.class_names[int(labels[0])], named
