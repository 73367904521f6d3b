"""What older versions of transformers lack, so that a saved model also runs on the versions that serving engines pin.

The package needs the version that pyproject.toml says. The files beside the weights run on 5.16.1, 5.19.0 and 5.20.2
as well: vLLM 0.33 admits 5.16.1 to 5.20, SGLang 0.5.23 wants 5.19.0. `make test-oldest` runs a saved folder on each.
"""

import torch

try:
    from transformers.modeling_utils import slice_logits_to_keep  # from 5.21 on
except ImportError:

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """The positions whose logits are asked for, (B, T, D) -> (B, K, D), as transformers slices them from 5.21 on.

        Args:
            logits_to_keep: the last so many positions (0: all); a (K,) tensor of positions; a (B, K) tensor of
                positions of each batch row; or a (B, T) bool tensor, which gives (positions that are True, D).
        """
        if isinstance(logits_to_keep, int):
            return hidden_states[:, slice(-logits_to_keep, None)]
        if logits_to_keep.ndim == 1:
            return hidden_states[:, logits_to_keep]
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


__all__ = ["slice_logits_to_keep"]
