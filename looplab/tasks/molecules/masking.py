"""Masked decoding: `ValidPrefix`, a logits processor that allows only tokens that can still lead to a molecule.

A token is masked if no molecule begins with the SMILES so far and that token; `<eos>` is masked until the SMILES is a
molecule. `partialsmiles` (O'Boyle; MIT) decides: it follows brackets, ring bonds, valences, and aromatic systems that
are complete. It accepts some strings that rdkit does not, such as aromatic atoms outside of a ring. Samples of a
masked model are reported apart from the others.

    model.generate(start, do_sample=True, logits_processor=LogitsProcessorList([ValidPrefix(tokenizer)]))
"""

from functools import lru_cache

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

# Tokens with a smaller probability, which are most of the 27 tokens of MOSES, are masked without a check, unless no
# other token may follow.
LEAST = 1e-4
PREFIXES = 100_000  # checked prefixes that are remembered


class ValidPrefix(LogitsProcessor):
    """Sets the logits of tokens that may not follow to -inf, batch row by batch row.

    If no token may follow, only `<eos>` stays: the sample ends, and is not valid. Batch rows that have ended stay as
    they are.

    Args:
        tokenizer: a `smiles_tokenizer`.
        least: probability below which a token is masked without a check.

    Raises:
        ImportError: partialsmiles is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, least: float = LEAST):
        import partialsmiles

        self.least, self.eos = least, tokenizer.eos_token_id
        self.words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.special = {tokenizer.pad_token_id, tokenizer.bos_token_id}

        @lru_cache(PREFIXES)
        def reads(smiles: str, partial: bool) -> bool:
            try:
                partialsmiles.ParseSmiles(smiles, partial=partial)
            except partialsmiles.Error:
                return False
            return True

        self._reads = reads

    def may_follow(self, smiles: str, token: int) -> bool:
        """Whether the token may come next; `<eos>` may if the SMILES is a molecule."""
        if token in self.special:
            return False
        if token == self.eos:
            return bool(smiles) and self._reads(smiles, False)
        return self._reads(smiles + self.words[token], True)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masked logits (B, V), for ids (B, T) that begin with `<bos>` and logits (B, V)."""
        masked = torch.full_like(scores, -torch.inf)
        probabilities = scores.float().softmax(-1).tolist()
        for row, ids in enumerate(input_ids.tolist()):
            if self.eos in ids:
                masked[row] = scores[row]
                continue
            smiles = "".join(self.words[i] for i in ids if i not in self.special)
            likely = [i for i, share in enumerate(probabilities[row]) if share >= self.least]
            kept = [i for i in likely if self.may_follow(smiles, i)]
            kept = kept or [i for i in range(len(self.words)) if self.may_follow(smiles, i)] or [self.eos]
            masked[row, kept] = scores[row, kept]
        return masked
