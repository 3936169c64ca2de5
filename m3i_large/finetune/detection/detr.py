"""Detectors of transformers' DETR family over an exported backbone: RT-DETRv2 and D-FINE.

They take a backbone's maps at strides 8, 16 and 32 through transformers' AutoBackbone. The backbone itself stays
outside of them, in `backbone`, as every task has it; what they are given as theirs only passes its maps on. They run in
fp32: box coordinates in bf16 are wrong by pixels.

Legend: B images, C channels, H W pixels, M objects, Q queries, K detections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import (
    AutoBackbone,
    AutoConfig,
    DFineConfig,
    DFineForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from m3i_large.finetune.backbones import backbone_maps, build_levels, without_batch_statistics
from m3i_large.finetune.detection.batch import DetectionBatch, Detections
from m3i_large.finetune.detection.config import DetrConfig
from m3i_large.finetune.pixels import Normalize
from m3i_large.finetune.task import TaskModel

STRIDES = (8, 16, 32)
KINDS: dict[str, tuple[type, type]] = {
    "rt_detr_v2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
    "d_fine": (DFineConfig, DFineForObjectDetection),
}


class MapsConfig(BackboneConfigMixin, PreTrainedConfig):
    """Of `Maps`: the channels of each map."""

    model_type = "m3i_maps"

    def __init__(self, channels: Sequence[int] = (), **more: Any) -> None:
        super().__init__(**more)
        self.channels = list(channels)
        self.stage_names = [f"stage{number}" for number in range(len(self.channels))]
        self.set_output_features_output_indices(out_features=self.stage_names, out_indices=None)


class Maps(BackboneMixin, PreTrainedModel):
    """A backbone without parameters whose maps of the next image are those it was handed."""

    config_class = MapsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MapsConfig) -> None:
        super().__init__(config)
        self.num_features = config.channels
        self.handed: tuple[Tensor, ...] = ()
        self.post_init()

    def forward(self, pixel_values: Tensor, **settings: Any) -> BackboneOutput:  # type: ignore[override]
        """The maps; the image is not looked at."""
        maps, self.handed = self.handed, ()  # no graph outlives its step
        return BackboneOutput(feature_maps=maps)  # type: ignore[arg-type]  # it means any number


AutoConfig.register(MapsConfig.model_type, MapsConfig)
AutoBackbone.register(MapsConfig, Maps)


class Detr(TaskModel):
    """A detector of queries around a backbone; arguments as RCNN's."""

    def __init__(
        self, backbone: nn.Module, config: DetrConfig, *, images_C: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, Normalize(mean, std)
        self.detections = config.detections
        # The detector's encoder is the pyramid of a backbone that has maps of its own at these strides.
        self.pyramid, channels = build_levels(backbone, out=config.width, strides=STRIDES)
        self.detector = _detector(config, channels, num_classes=len(images_C))

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor] | list[Detections]:
        """See TaskModel; losses: one for each of the detector's kinds, over all its layers and denoising groups."""
        image_BCHW = self.normalize(batch.image_BCHW, batch.size_B2)
        maps = self.pyramid(backbone_maps(self.backbone, image_BCHW))
        self.detector.model.backbone.model.handed = tuple(x.float() for x in maps)
        side_2 = image_BCHW.new_tensor(image_BCHW.shape[2:])
        with torch.autocast(image_BCHW.device.type, enabled=False):
            if self.training:
                labels, weight = _labels(batch, side_2)
                losses = self.detector(image_BCHW.float(), labels=labels).loss_dict
                return {name: weight * loss for name, loss in _by_kind(losses).items()}
            found = self.detector(image_BCHW.float())
        scale_4 = side_2.flip(0).repeat(2)
        return [
            _detections(*one, scale_4=scale_4, most=self.detections)
            for one in zip(found.logits, found.pred_boxes, batch.size_B2, strict=True)
        ]


def _detector(config: DetrConfig, channels: list[int], *, num_classes: int) -> Any:
    settings, detector = KINDS[config.kind]
    given = settings(
        backbone_config=MapsConfig(channels=channels),
        num_labels=num_classes,
        encoder_in_channels=channels,
        decoder_in_channels=[config.width] * len(STRIDES),
        feat_strides=list(STRIDES),
        encoder_hidden_dim=config.width,
        d_model=config.width,
        encoder_ffn_dim=config.feedforward,
        decoder_ffn_dim=config.feedforward,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        num_queries=config.queries,
        num_denoising=config.denoising,
        # A prior of 1 / (number of classes + 1) is half for a single class.
        initializer_bias_prior_prob=0.01,
    )
    built = without_batch_statistics(detector(given))
    for module in built.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:  # D-FINE's constants: nothing to shard, average or save
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
    return built


def _labels(batch: DetectionBatch, side_2: Tensor) -> tuple[list[dict[str, Tensor]], float]:
    """Targets as the detector has them (centre, width, height as shares of the padded image), and a weight of losses.

    A micro-batch without any object is given one and the weight 0: it would skip the denoising queries, and under
    ZeRO-3 all ranks must use the same parameters.
    """
    scale_4 = side_2.flip(0).repeat(2)
    labels = [
        {"class_labels": t.labels_M, "boxes": box_convert(t.boxes_M4, "xyxy", "cxcywh") / scale_4}
        for t in batch.targets
    ]
    if any(len(t.labels_M) for t in batch.targets):
        return labels, 1.0
    box_14 = scale_4.new_full((1, 4), 0.5)
    return [{"class_labels": scale_4.new_zeros(1, dtype=torch.int64), "boxes": box_14}, *labels[1:]], 0.0


def _by_kind(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """loss_vfl, loss_vfl_aux_0, loss_vfl_dn_0, ... -> vfl; they are weighted already."""
    out: dict[str, Tensor] = {}
    for name, loss in losses.items():
        kind = name.removeprefix("loss_").split("_")[0]
        out[kind] = out[kind] + loss if kind in out else loss
    return out


def _detections(logit_QC: Tensor, box_Q4: Tensor, size_2: Tensor, *, scale_4: Tensor, most: int) -> Detections:
    """The best pairs of query and class; boxes end where the image does."""
    score_K, index_K = logit_QC.float().sigmoid().flatten().topk(min(most, logit_QC.numel()))
    query_K, label_K = index_K // logit_QC.shape[1], index_K % logit_QC.shape[1]
    box_K4 = box_convert(box_Q4[query_K].float(), "cxcywh", "xyxy") * scale_4
    limit_4 = size_2.flip(0).repeat(2).to(box_K4)
    boxes_K4 = box_K4.clamp(min=torch.zeros_like(limit_4), max=limit_4)
    return Detections(boxes_K4=boxes_K4.cpu(), scores_K=score_K.cpu(), labels_K=label_K.cpu())
