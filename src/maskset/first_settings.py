"""The settings that `maskset train --help` shows: without a recipe, so that nothing slow is imported. A test compares them."""

FIRST_SETTINGS = {
    "train.epochs": "passes over the training images",
    "train.batch_size": "images in one optimiser step, over all processes and accumulated parts",
    "train.accumulate": "parts into which a batch is split, to save memory",
    "train.learning_rate": "learning rate of everything but the backbone and the sampling offsets",
    "train.precision": "precision of the network; losses and matching are always in fp32",
    "train.ema_decay": "decay of the weight average that is evaluated and saved; 0 disables it",
    "train.evaluate_every": "epochs between evaluations; 0 evaluates only at the end",
    "train.seed": "random seed of initialisation, dropout, order and augmentation",
    "data.augmentation": "detr: flip, scale, crop; mmdet: scale once; flip: no crop; lsj: scale jitter; none",
    "data.workers": "processes that read images; results do not depend on it",
}
