"""Fine-tuning of an exported backbone: one loop, three tasks (detection, classification, segmentation).

recipe      what a fine-tuning is; recipes/ft_*.yaml the paper's protocols
task        what a task gives the loop: model, samples, scores
sampling    which samples a step trains on: a pure function of (seed, step)
layer_decay learning rates that fall from the head to the stem
backbones   feature pyramids over the exported backbones
trainer     set-up and loop
"""
