"""InternImage for mmdetection 3: a registered backbone, and learning rates that fall from head to stem.

A configuration names it: `custom_imports = dict(imports=['m3i_large.integrations.mmdet'])`; those in mmdet_configs/ do.
The parameters' names are the official ones, so checkpoints are those of mmdetection's other InternImages; DCNv3 is this
project's operator, so nothing of it is compiled.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.export.weights import read_weights
from m3i_large.finetune.layer_decay import param_groups
from m3i_large.models.config import InternImageConfig
from m3i_large.models.factory import model_config
from m3i_large.models.intern_image import InternImage
from m3i_large.optim import decays
from m3i_large.parallel.remat import rematerialize


@MODELS.register_module()
class M3IInternImage(InternImage):
    """The backbone of create_model.

    Args:
        name: internimage_t, _s, _b, _l, _xl, _h, _g, or internimage with channels, depths and groups.
        weights: a file that `m3i export` wrote (any layout of an InternImage) or a published one; None: random, or a
            whole detector's `load_from`. Unlike init_cfg's Pretrained it is strict.
        out_indices: which of the maps at strides 4, 8, 16, 32.
        frozen_stages: 0: none; n: the stem and the first n levels are not trained.
        with_cp: activation checkpointing of every block.
        arch: fields that differ, such as drop_path.

    Raises:
        UserError: an unknown name or field; in `init_weights`, a file that does not fit.
    """

    def __init__(
        self,
        name: str = "internimage_h",
        *,
        weights: str | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        **arch: Any,
    ) -> None:
        config = model_config(name, **arch)
        if not isinstance(config, InternImageConfig):
            raise UserError(f"backbone.name: got {name!r}; needed: an InternImage")
        super().__init__(config)
        self._weights, self._name, self._arch = weights, name, arch
        self._out_indices = tuple(out_indices)
        for part in [self.patch_embed, *self.levels[:frozen_stages]] if frozen_stages else []:
            part.requires_grad_(False)
        if with_cp:
            rematerialize(self.blocks, random=True)

    def init_weights(self) -> None:
        """Fills every tensor from `weights`; mmdetection calls it before training."""
        if self._weights is not None:
            state = read_weights(Path(self._weights), name=self._name).build(**self._arch).state_dict()
            self.load_state_dict(state, strict=True)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """image_BCHW -> the maps of `out_indices`, (B, C_i, H_i, W_i)."""
        maps = super().forward(image_BCHW)
        return tuple(maps[index] for index in self._out_indices)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class M3ILayerDecay(DefaultOptimWrapperConstructor):
    """AdamW's groups for a detector on M3IInternImage; norms of `post_norms` belong to the block that they follow.

    `paramwise_cfg`: layer_decay (factor from one layer to the one before it), offset_scale (a further factor for the
    backbone's offsets; official: dcn_lr_mul).
    """

    def add_params(self, params: list[dict[str, Any]], module: Any, **settings: Any) -> None:
        """Appends the groups of a detector to `params`."""
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        groups = param_groups(
            named,
            module.backbone,
            layer_decay=self.paramwise_cfg.get("layer_decay", 1.0),
            weight_decay=self.base_wd or 0.0,
            decays=lambda name, parameter: decays(name, tuple(parameter.shape)),
            offset_scale=self.paramwise_cfg.get("offset_scale", 1.0),
        )
        params += [group | {"lr": self.base_lr * group["lr_scale"]} for group in groups]
