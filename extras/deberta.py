"""DeBERTa v2 and v3: an Encoder whose attention compares contents with relative positions.

He et al. 2021, https://arxiv.org/abs/2006.03654. It is also the example of a family in a file of its own, for which
model.model_class has two lines: what differs from an Encoder and its Block, and nothing else.
"""

import torch
import torch.nn as nn

from model import Block, Dropout, Encoder, Linear, make_norm, split_heads


class DebertaBlock(Block):
    """A Block whose attention adds scores of contents and relative positions."""

    def __init__(self, config, index):
        super().__init__(config, index)
        D = config.hidden_size
        if config.c2p and not config.share_att_key:
            self.position_key = Linear(D, D)
        if config.p2c and not config.share_att_key:
            self.position_query = Linear(D, D)
        self.scale = (self.head_dim * (1 + config.c2p + config.p2c)) ** -0.5

    def attend(self, q, k, v, mask, causal, bucket, table):
        """As Block.attend; `table` (R, D) holds a vector per bucket of distances, `bucket` (T, T) its row for i, j."""
        scores = self.position_scores(q, k, bucket, table)
        if mask is not None:  # the lowest number: padding, which sees nothing, averages over all tokens
            scores.masked_fill_(~mask[:, :, :q.shape[2]], torch.finfo(scores.dtype).min)
        return super().attend(q, k, v, scores, causal)

    def position_scores(self, q, k, bucket, table):
        """Scores (B, H, Q, T) of contents q (B, H, Q, D) and k (B, H, T, D) with the other token's relative position.

        Disentangled attention (Eq. 4) without its term q k^T.
        """
        (B, H, Q, _), table, scores = q.shape, self.dropout(table)[None], 0
        bucket = bucket[:Q].expand(B, H, -1, -1)
        shared = self.config.share_att_key  # positions are projected as content is; hooks see that alone
        if self.config.c2p:
            position = self.key.forward(table) if shared else self.position_key(table)  # (1, R, H * D)
            scores = (q @ split_heads(position * self.scale, self.head_dim).mT).gather(-1, bucket)
        if self.config.p2c:
            position = self.query.forward(table) if shared else self.position_query(table)
            scores = scores + (k @ split_heads(position * self.scale, self.head_dim).mT).gather(-1, bucket.mT).mT
        return scores


class Deberta(Encoder):
    """deberta-v2 with the heads of an Encoder."""

    block = DebertaBlock
    names = {**Encoder.names, "query": "attention.self.query_proj", "key": "attention.self.key_proj",
             "value": "attention.self.value_proj", "position_key": "attention.self.pos_key_proj",
             "position_query": "attention.self.pos_query_proj", "relative_embed": "encoder.rel_embeddings",
             "relative_norm": "encoder.LayerNorm"}

    @staticmethod
    def settle(c, refuse):
        """What its attention adds to a Config; c2p, p2c: compare content with the key's position, the query's.

        buckets: of distances, 0 = each its own; furthest: where the last one ends; span: buckets on either side.
        """
        if c.relative_attention is not True:  # where it is missing, transformers takes plain attention
            refuse("relative_attention", "true: nothing else is supported")
        types = c.pos_att_type.split("|") if isinstance(c.pos_att_type, str) else c.pos_att_type
        if not types or not isinstance(types, list) or not all(part in ("c2p", "p2c") for part in types):
            refuse("pos_att_type", "c2p, p2c or both")
        reach = c.max_relative_positions if c.max_relative_positions > 0 else c.max_position_embeddings
        c.buckets = max(0, c.position_buckets)
        if c.buckets and not 2 <= c.buckets < 2 * (reach - 1):
            refuse("position_buckets", f"from 2 to {2 * reach - 3}, or -1")
        c.c2p, c.p2c, c.furthest, c.span = "c2p" in types, "p2c" in types, reach - 1, c.buckets or reach
        if c.position_biased_input is False:
            c.max_position_embeddings = 0

    def __init__(self, config, head):
        super().__init__(config, head)
        self.prefix = "deberta"
        self.relative_embed = nn.Embedding(2 * config.span, config.hidden_size)
        self.relative_norm = make_norm(config) if "layer_norm" in str(config.norm_rel_ebd) else nn.Identity()
        if head == "classify":
            self.head_names = {"head.dense": "pooler.dense", "head.out_proj": "classifier"}
            self.head.first_dropout, self.head.activation = Dropout(config.pooler_dropout), nn.GELU()

    def hidden_states(self, tokens, mask=None, types=None, first_token_only=False):
        """As Encoder.hidden_states; padding sees nothing, either."""
        x, visible = self.embeddings(tokens, types), None
        if mask is not None:
            x, visible = x * mask[..., None], (mask[:, None] & mask[:, :, None])[:, None]  # (B, 1, T, T)
        bucket, table = self.relative_positions(tokens.shape[1])
        return self.run_blocks(self.dropout(x), {None: (visible, False)}, first_token_only, bucket=bucket, table=table)

    def relative_positions(self, T):
        """(bucket (T, T), table (R, D)) for `attend`: the part of the table for T tokens, and each pair's row in it."""
        at, span = torch.arange(T, device=self.embed.weight.device), self.config.span
        bucket, middle = at[:, None] - at, self.config.buckets // 2  # query - key
        if middle:  # the nearest half of the buckets holds a distance each, the others grow logarithmically
            far = bucket.abs().clamp(min=middle) / middle
            furthest = torch.tensor(self.config.furthest / middle)  # float32 decides
            far = torch.log(far) / torch.log(furthest) * (middle - 1)
            far = bucket.sign() * (middle + far.ceil())
            bucket = torch.where(bucket.abs() <= middle, bucket, far).long()
        near = T if T <= (middle or span) else span
        table = self.relative_embed.weight[span - near:span + near]
        return (bucket + near).clamp(0, 2 * near - 1), self.relative_norm(table)
