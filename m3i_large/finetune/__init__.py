"""Fine-tuning of an exported backbone: one loop, and what a task gives it.

recipe      what a fine-tuning is; recipes/ft_*.yaml the paper's protocols
task        what a task gives the loop: samples, model, scores
sampling    which samples a step trains on: a pure function of (seed, step)
data        batches, made ahead of time
layer_decay learning rates that fall from the head to the stem
backbones   maps of the exported backbones at the strides that heads want
pixels      from images to what a backbone was trained on
trainer     from the arguments to the end of a run
loop        what one optimizer step does, when it is measured, what is saved
detection/, classification/, segmentation/  the tasks; a package is named as its recipes' `task.kind`
"""
