"""A checkpoint's tokenizer: texts and pairs to the ids that transformers' AutoTokenizer gives, and back."""

import re
from pathlib import Path

import numpy as np
import tokenizers
from tqdm import tqdm

from model import UserError, note, read_settings


# transformers' class -> the tokens it has by default; in these classes tokenizer_config.json rules over tokenizer.json
ENDS = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
BRACKETS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
CLASSES = {
    "BertTokenizer": BRACKETS, "DebertaV2Tokenizer": BRACKETS | {"bos": "[CLS]", "eos": "[SEP]"},
    "RobertaTokenizer": ENDS, "XLMRobertaTokenizer": ENDS,
    "GPT2Tokenizer": {"unk": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    "Qwen2Tokenizer": {"unk": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    "LlamaTokenizer": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
    "GemmaTokenizer": {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "mask": "<mask>"}}
FAMILIES = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer", "gpt2": "GPT2Tokenizer",     # where none is named
            "xlm-roberta": "XLMRobertaTokenizer", "deberta-v2": "DebertaV2Tokenizer", "qwen2": "Qwen2Tokenizer",
            "qwen3": "Qwen2Tokenizer", "gemma": "GemmaTokenizer"}
# class -> the model that it makes of tokenizer.json's, and that one's settings, whatever the file says
PLAIN = dict(dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None)
BYTES = dict(PLAIN, unk_token=None, fuse_unk=False)
MODELS = {"BertTokenizer": ("WordPiece", dict(continuing_subword_prefix="##", max_input_chars_per_word=100)),
          "RobertaTokenizer": ("BPE", BYTES), "GPT2Tokenizer": ("BPE", BYTES),
          "Qwen2Tokenizer": ("BPE", dict(BYTES, byte_fallback=False)),
          "LlamaTokenizer": ("BPE", dict(PLAIN, unk_token=None, fuse_unk=True, byte_fallback=True)),
          "GemmaTokenizer": ("BPE", dict(PLAIN, fuse_unk=True, byte_fallback=True)),
          "XLMRobertaTokenizer": ("Unigram", {}), "DebertaV2Tokenizer": ("Unigram", {})}
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+")   # how a text is split before it is encoded
KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")    # in the order in which transformers adds them
# settings in tokenizer_config.json that are read, and those that do not change a text's ids
TOKENIZER_SETTINGS = set("""
    tokenizer_class do_lower_case strip_accents tokenize_chinese_chars add_prefix_space add_bos_token add_eos_token
    legacy truncation_side added_tokens_decoder model_max_length split_special_tokens extra_special_tokens
    additional_special_tokens pad_token bos_token eos_token unk_token sep_token cls_token mask_token
    clean_up_tokenization_spaces padding_side pad_to_multiple_of pad_token_type_id padding truncation max_length stride
    truncation_strategy chat_template auto_map tokenizer_file name_or_path special_tokens_map_file errors trim_offsets
    backend is_local use_default_system_prompt model_input_names processor_class use_fast from_slow do_basic_tokenize
    never_split vocab_type unk_id split_by_punct model_type sp_model_kwargs spaces_between_special_tokens
    full_tokenizer_file return_tensors
""".split())


class Tokenizer:
    """A checkpoint's tokenizer (backend: the tokenizers.Tokenizer) and the ids of its special tokens.

    pad_id falls back to eos, unk, 0; eos_ids: all that end a generation; types: the model tells a pair's texts apart.
    """

    @classmethod
    def from_folder(cls, folder):
        """Read tokenizer.json, vocab.txt (BERT) or vocab.json and merges.txt (RoBERTa, GPT-2), as AutoTokenizer."""
        self, path = cls(), Path(folder) / "tokenizer.json"
        about = path.with_name("tokenizer_config.json")
        names, config, generation = (read_settings(path.with_name(name)) for name in (
            about.name, "config.json", "generation_config.json"))
        if not names.get("added_tokens_decoder"):   # written by earlier releases
            added = read_settings(path.with_name("added_tokens.json"))
            names |= read_settings(path.with_name("special_tokens_map.json"))
            names["added_tokens_decoder"] = {str(number): {"content": token} for token, number in added.items()}
        family = str(config.get("model_type"))
        kind = str(names.get("tokenizer_class") or config.get("tokenizer_class") or FAMILIES.get(family))
        kind = "" if family in ("mistral", "olmo2") else kind.removesuffix("Fast")  # whose tokenizer.json rules
        kind = "Qwen2Tokenizer" if family == "qwen2" else kind   # whatever class is named
        inputs = str(names.get("model_input_names") or "token_type_ids")
        typed = "token_type_ids" in inputs and kind != "DistilBertTokenizer"
        kind = re.sub("^(DistilBert|Electra|MobileBert|ConvBert)Tokenizer$", "BertTokenizer", kind)
        kind = re.sub("^(Bart|LED|Longformer)Tokenizer$", "RobertaTokenizer", kind)
        if kind not in (*MODELS, "PreTrainedTokenizer", "TokenizersBackend", "None", ""):
            note(f"{about}: what transformers' class {kind[:40]!a} does is not followed, tokenizer.json alone is")
        self.path = path
        try:
            self.backend = build(path, kind)
            tokens = special_tokens(self.backend, names, kind)
            configure(self.backend, names, kind, tokens, legacy=not path.is_file())
            whole = self.backend.encode("a")
        except UserError:
            raise
        except Exception as error:  # tokenizers raises nothing more specific
            raise UserError(f"{path}: not a tokenizer ({error}): fetch or make it again") from None
        unread = [key for key, value in names.items() if value and key not in TOKENIZER_SETTINGS and key[:1] != "_"]
        if unread:
            note(f"{about}: not used: {', '.join(map(ascii, unread))[:200]}")
        self.side = "left" if names.get("truncation_side") == "left" else "right"

        def ids(name):      # the tokenizer's own, then the configs', some of which say -1 for none
            found = [self.backend.token_to_id(tokens[name]) if name in tokens else None]
            for settings in (config, generation):
                value = settings.get(f"{name}_token_id")
                found += value if isinstance(value, list) else [value]
            return [n for n in found if type(n) is int and 0 <= n < 2**31]

        self.eos_id = next(iter(ids("eos")), None)
        self.eos_ids = sorted(set(ids("eos")))
        self.pad_id = [*ids("pad"), *ids("eos"), *ids("unk"), 0][0]
        self.types = typed and (family == "bert" or family == "deberta-v2" and bool(config.get("type_vocab_size")))
        # what the post-processor puts before a text, such as bos; what it puts after would stop a generation there
        self.prefix = whole.ids[:whole.special_tokens_mask.index(0)] if 0 in whole.special_tokens_mask else []
        begins, ends = whole.tokens[:1] == [tokens.get("bos")], whole.tokens[-1:] == [tokens.get("eos")]
        for key, there in (("add_bos_token", begins), ("add_eos_token", ends)):
            if bool(names.get(key, there)) != there:
                note(f"{about}: {key} is {names[key]}, tokenizer.json does otherwise and rules, as in transformers 5")
        self.longest = names.get("model_max_length")
        return self

    def encode(self, texts, pairs=None, max_length=None, special=True):
        """Return (ids, types), int32 arrays of each text or pair, cut longest first; special: with special tokens."""
        if max_length is not None:
            if max_length <= self.backend.num_special_tokens_to_add(pairs is not None):
                raise UserError(f"max length {max_length} leaves no room for text: use at least 8")
            self.backend.enable_truncation(max_length, direction=self.side)
        ids, types = [], []
        for start in tqdm(range(0, len(texts), 4096), "tokenizing", leave=False, disable=len(texts) < 10_000):
            part = slice(start, start + 4096)       # encodings hold much besides ids: not all at once
            chunk = texts[part] if pairs is None else list(zip(texts[part], pairs[part]))
            try:
                encodings = self.backend.encode_batch(chunk, add_special_tokens=special)
            except Exception as error:  # such as a character that is in no token, and no token for unknown ones
                raise UserError(f"{self.path}: cannot encode a text ({error}): fetch the tokenizer again") from None
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
            types += [np.array(encoding.type_ids, np.int32) for encoding in encodings]
        self.backend.no_truncation()
        return ids, types

    def encode_answers(self, prompts, answers):
        """Return (prompts' ids, answers' ids, how many were encoded apart), without bos and eos.

        They are encoded joined and split where the prompt's own ids end, unless a merge crosses that boundary.
        """
        asked = self.encode(prompts, special=False)[0]
        joined = self.encode([prompt + answer for prompt, answer in zip(prompts, answers)], special=False)[0]
        apart = [i for i, ids in enumerate(asked) if not np.array_equal(joined[i][:len(ids)], ids)]
        said = [whole[len(ids):] for whole, ids in zip(joined, asked)]
        for i, ids in zip(apart, self.encode([answers[i] for i in apart], special=False)[0]):
            said[i] = ids
        return asked, said, len(apart)

    def decode(self, ids, prompt=()):
        """Return the text of ids generated after a prompt's ids, without special tokens."""
        # decoded together: SentencePiece's decoder drops a space at the start, which indents Python
        before, whole = (self.backend.decode([int(i) for i in part]) for part in (prompt, [*prompt, *ids]))
        return whole[len(before):]


def build(path, kind):
    """Return the tokenizers.Tokenizer of tokenizer.json, or of the vocabulary beside it. UserError: there is none."""
    vocabulary, merges = path.with_name("vocab.json"), path.with_name("merges.txt")
    if path.is_file():
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        return backend
    if kind == "BertTokenizer" and path.with_name("vocab.txt").is_file():
        model = tokenizers.models.WordPiece.from_file(str(path.with_name("vocab.txt")), unk_token="[UNK]")
        return tokenizers.Tokenizer(model)
    if kind in ("RobertaTokenizer", "GPT2Tokenizer") and vocabulary.is_file() and merges.is_file():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return backend
    folder = str(path.parent)
    program = f"from transformers import AutoTokenizer as T; T.from_pretrained({folder!r}).save_pretrained({folder!r})"
    raise UserError(f"{path}: no such file, nor a vocabulary that is read without it: fetch the model's tokenizer "
                    f"files, or make it: pip install transformers sentencepiece protobuf, then python -c \"{program}\"")


def special_tokens(backend, names, kind):
    """Return {"pad", "bos", ...: token}; what tokenizer_config.json has and the backend lacks is added to it."""
    def content(token):
        return token.get("content") if isinstance(token, dict) else token

    def added(token, **flags):      # a text, or a dict with flags
        given = token if isinstance(token, dict) else {}
        flags |= {flag: bool(value) for flag, value in given.items() if flag not in ("content", "__type", "id", *flags)}
        return tokenizers.AddedToken(content(token), **flags)

    for number, token in sorted(names["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        backend.add_tokens([added(token)])
        if backend.token_to_id(content(token)) != int(number):
            note(f"tokenizer_config.json: token {content(token)!a} has id {number} in added_tokens_decoder, "
                 f"{backend.token_to_id(content(token))} in the tokenizer: the latter is used, as in transformers")
    tokens = CLASSES.get(kind, {}) | {key: content(names[f"{key}_token"]) for key in KINDS if f"{key}_token" in names}
    tokens = {key: tokens[key] for key in KINDS if tokens.get(key)}
    extra, more = names.get("extra_special_tokens") or [], names.get("additional_special_tokens") or []
    extra = [*(extra.values() if isinstance(extra, dict) else extra), *more]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    given = [names.get(f"{key}_token", token) for key, token in tokens.items()] + extra
    new = {content(token): token for token in reversed(given)}      # the first that is given of the same ones
    backend.add_special_tokens([added(new[token], special=True) for token in dict.fromkeys(map(content, given))
                                if token and token not in known])
    return tokens


def configure(backend, names, kind, tokens, legacy):
    """Do to the backend what transformers' class `kind` does on loading; legacy: there is no tokenizer.json."""
    backend.encode_special_tokens = bool(names.get("split_special_tokens"))
    model, byte_level = type(backend.model).__name__, "ByteLevel" in repr(backend.pre_tokenizer)
    ids = {key: (token, backend.token_to_id(token)) for key, token in tokens.items()}

    def around(*templates):     # of a text, of a pair
        return tokenizers.processors.TemplateProcessing(*(text.format(**tokens) for text in templates),
                                                        special_tokens=[*dict(ids.values()).items()])

    space, before, normalizers = names.get("add_prefix_space"), tokenizers.pre_tokenizers, tokenizers.normalizers
    makes, settings = MODELS.get(kind, (None, {}))
    if kind == "LlamaTokenizer" and byte_level:     # of LLaMA 3, whose tokenizer.json rules
        return
    if makes not in (None, model):
        note(f"tokenizer_config.json: tokenizer_class {kind} does not fit the {model} in tokenizer.json, which is used")
        return
    for name, value in settings.items():
        setattr(backend.model, name, value)
    file = rules(backend)
    if kind == "BertTokenizer":
        backend.model.unk_token = tokens.get("unk", "[UNK]")
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=names.get("tokenize_chinese_chars", True),
            strip_accents=names.get("strip_accents"), lowercase=names.get("do_lower_case", True))
        backend.pre_tokenizer = before.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        backend.post_processor = tokenizers.processors.BertProcessing(ids["sep"], ids["cls"])
    elif kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = before.Sequence([
            before.Split(tokenizers.Regex(QWEN), "isolated"),
            before.ByteLevel(add_prefix_space=bool(space), use_regex=False)])
    elif kind in ("RobertaTokenizer", "GPT2Tokenizer"):
        backend.normalizer = None
        backend.pre_tokenizer = before.ByteLevel(add_prefix_space=bool(space))
        if kind == "GPT2Tokenizer" and names.get("add_bos_token") and legacy:
            backend.post_processor = around("{bos} $A", "{bos} $A {bos} $B")
        elif kind == "RobertaTokenizer":
            backend.post_processor = tokenizers.processors.RobertaProcessing(
                ids["sep"], ids["cls"], add_prefix_space=bool(space))
    elif kind == "XLMRobertaTokenizer":
        backend.post_processor = around("{bos} $A {eos}", "{bos} $A {eos} {eos} $B {eos}")
        backend.pre_tokenizer = before.Sequence([
            before.WhitespaceSplit(), before.Metaspace(prepend_scheme="never" if space is False else "always")])
    elif kind == "DebertaV2Tokenizer":
        backend.post_processor = around("{cls} $A {sep}", "{cls} $A {sep} $B:1 {sep}:1")
        steps = [normalizers.Lowercase()] if names.get("do_lower_case") else []
        backend.normalizer = normalizers.Sequence([
            *steps, normalizers.Replace(tokenizers.Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC(),
            normalizers.Strip(left=False, right=True)])
        steps = [before.Punctuation(behavior="isolated")] if names.get("split_by_punct") else []
        backend.pre_tokenizer = before.Sequence([
            *steps, before.Metaspace(prepend_scheme="first" if space is False else "always")])
    elif kind == "LlamaTokenizer":
        scheme = "never" if space is False else "always" if names.get("legacy") else "first"
        backend.normalizer = None
        backend.pre_tokenizer = before.Metaspace(prepend_scheme=scheme, split=False)
    elif kind == "GemmaTokenizer":
        backend.model.unk_token = tokens["unk"]
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = before.Split(" ", "merged_with_previous")
    replaced = [name for name, rule in rules(backend).items() if file[name] not in ("None", rule)]
    if replaced and makes == "BPE" and kind != "LlamaTokenizer":    # of which transformers 4 wrote other files
        note(f"tokenizer.json: its {' and '.join(replaced)} is not used, {kind} has its own, as in transformers 5")


def rules(backend):
    """What a backend does to a text before its model does, as text, but for what tokenizer_config.json may change."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    return {name: re.sub(r"(trim_offsets|add_prefix_space)=\w+", "", str(part)) for name, part in parts.items()}
