//! How well a sharer's tokenizer can read what the receiver's wrote: measured over texts, for any two tokenizers.

use super::{Alignment, MatchKind, TokenAligner, span};
use crate::tokenizer::{Error, Tokenizer};
use serde::Serialize;
use std::{collections::HashMap, fmt, ops::Range};

/// Texts of several scripts, as people write them.
pub const TEXTS: [&str; 6] = [
    "In which country is Grenoble: A Spain, B Poland, C Greece, D France?",
    "The quick brown fox jumps over the lazy dog, 3.14159 times.",
    "def mean(xs: list[float]) -> float:\n    return sum(xs) / len(xs)\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "北京是中国的首都。東京は日本の首都です。🙂",
];

/// What [`measure`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AlignmentReport {
    pub alignment: &'static str,
    pub texts: usize,
    pub characters: usize,
    pub receiver_tokens: usize,
    pub sharer_tokens: usize,
    /// Receiver tokens with exactly one sharer token for the same text (or the same special role). Pieces of a
    /// character count: as published they are aligned with U+FFFD.
    pub one_to_one: usize,
    /// Receiver tokens whose text the sharer cuts into several tokens.
    pub one_to_many: usize,
    /// Sharer tokens over all `one_to_many`, and the most for one receiver token.
    pub pieces: usize,
    pub most_pieces: usize,
    /// What the sharer reads, as text, against the original: corpus BLEU-4 (0 to 1; see [`bleu`]).
    pub bleu: f64,
    /// The same as edit distance in characters per character of the original.
    pub character_error_rate: f64,
    pub failures: Vec<Failure>,
}

/// A receiver token that the sharer cannot be told about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Which of the texts, and which of its receiver tokens.
    pub text: usize,
    pub token: usize,
    pub receiver_id: u32,
    pub kind: FailureKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A special token without counterpart.
    UnknownSpecial,
    /// The sharer has no token for the text.
    NoToken,
    /// A piece of a character, which alone is no text.
    BrokenCharacter,
}

impl AlignmentReport {
    /// Share of receiver tokens with one sharer token for the same text.
    pub fn one_to_one_rate(&self) -> f64 {
        self.one_to_one as f64 / self.receiver_tokens.max(1) as f64
    }

    /// Sharer tokens per receiver token that is cut into several.
    pub fn mean_pieces(&self) -> f64 {
        self.pieces as f64 / self.one_to_many.max(1) as f64
    }
}

impl fmt::Display for AlignmentReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "alignment {} over {} texts, {} characters",
            self.alignment, self.texts, self.characters
        )?;
        writeln!(f, "  receiver tokens {}, sharer tokens {}", self.receiver_tokens, self.sharer_tokens)?;
        writeln!(f, "  one to one      {:.2} %", 100.0 * self.one_to_one_rate())?;
        writeln!(
            f,
            "  one to many     {} (mean {:.2} sharer tokens, most {})",
            self.one_to_many,
            self.mean_pieces(),
            self.most_pieces
        )?;
        writeln!(f, "  BLEU-4          {:.4}", self.bleu)?;
        writeln!(f, "  character error {:.2} %", 100.0 * self.character_error_rate)?;
        write!(f, "  failures        {}", self.failures.len())
    }
}

/// Aligns `texts` (no chat template, no added specials) and measures how the sharer reads them.
pub fn measure<T: AsRef<str>>(
    receiver: &Tokenizer,
    sharer: &Tokenizer,
    alignment: Alignment,
    texts: &[T],
) -> Result<AlignmentReport, Error> {
    let by_token = alignment.strategy().map(|strategy| TokenAligner::new(receiver, sharer, strategy));
    let mut report = AlignmentReport {
        alignment: alignment.name(),
        texts: texts.len(),
        characters: 0,
        receiver_tokens: 0,
        sharer_tokens: 0,
        one_to_one: 0,
        one_to_many: 0,
        pieces: 0,
        most_pieces: 0,
        bleu: 0.0,
        character_error_rate: 0.0,
        failures: Vec::new(),
    };
    let mut read = Vec::new();
    let mut errors = 0;
    for (t, text) in texts.iter().map(AsRef::as_ref).enumerate() {
        let encoding = receiver.encode(text, false)?;
        let sharer_ids = match (&by_token, alignment) {
            (Some(aligner), _) => report.by_token(t, aligner, receiver, &encoding.ids)?,
            (None, Alignment::Span) => {
                let sharer = sharer.encode(text, false)?;
                report.by_span(t, &encoding.ids, &encoding.offsets, &sharer.offsets);
                sharer.ids
            }
            (None, _) => {
                report.by_id(t, receiver, sharer, &encoding.ids);
                encoding.ids.clone()
            }
        };
        report.receiver_tokens += encoding.ids.len();
        report.sharer_tokens += sharer_ids.len();
        report.characters += text.chars().count();
        read.push(sharer.decode(&sharer_ids, false));
        errors += edit_distance(text, &read[t]);
    }
    report.bleu = bleu(texts.iter().map(AsRef::as_ref).zip(read.iter().map(String::as_str)));
    report.character_error_rate = errors as f64 / report.characters.max(1) as f64;
    Ok(report)
}

impl AlignmentReport {
    fn count(&mut self, pieces: usize) {
        if pieces == 1 {
            self.one_to_one += 1;
        } else {
            self.one_to_many += 1;
            self.pieces += pieces;
            self.most_pieces = self.most_pieces.max(pieces);
        }
    }

    fn by_token(
        &mut self,
        text: usize,
        aligner: &TokenAligner,
        receiver: &Tokenizer,
        ids: &[u32],
    ) -> Result<Vec<u32>, Error> {
        let mut sharer_ids = Vec::new();
        for (token, &receiver_id) in ids.iter().enumerate() {
            let found = aligner.find(receiver_id)?;
            let mut fail = |kind| self.failures.push(Failure { text, token, receiver_id, kind });
            match found.kind {
                MatchKind::UnknownSpecial => fail(FailureKind::UnknownSpecial),
                MatchKind::Nothing => fail(FailureKind::NoToken),
                MatchKind::Special => self.count(1),
                MatchKind::One | MatchKind::Many(_) => {
                    if receiver.decode(&[receiver_id], false).contains(char::REPLACEMENT_CHARACTER) {
                        fail(FailureKind::BrokenCharacter);
                    }
                    self.count(if let MatchKind::Many(pieces) = found.kind { pieces } else { 1 });
                }
            }
            sharer_ids.push(found.id);
        }
        Ok(sharer_ids)
    }

    fn by_span(&mut self, text: usize, ids: &[u32], receiver: &[span::Offset], sharer: &[span::Offset]) {
        let columns = span::span_columns(receiver, sharer);
        for (token, (&(start, end), column)) in receiver.iter().zip(&columns).enumerate() {
            let Some(column) = column else {
                let kind = FailureKind::NoToken;
                self.failures.push(Failure { text, token, receiver_id: ids[token], kind });
                continue;
            };
            // Back from the column to the first sharer token that still reaches into the receiver's.
            let before = sharer[..=*column as usize].iter().rev();
            let pieces = before.take_while(|piece| piece.1 > start).count();
            if pieces > 1 {
                self.count(pieces);
            } else if sharer[*column as usize] == (start, end) {
                self.count(1);
            }
        }
    }

    fn by_id(&mut self, text: usize, receiver: &Tokenizer, sharer: &Tokenizer, ids: &[u32]) {
        for (token, &receiver_id) in ids.iter().enumerate() {
            match sharer.token_of(receiver_id) {
                Some(spelling) if Some(&spelling) == receiver.token_of(receiver_id).as_ref() => self.count(1),
                Some(_) => {}
                None => {
                    let kind = FailureKind::NoToken;
                    self.failures.push(Failure { text, token, receiver_id, kind });
                }
            }
        }
    }
}

/// Corpus BLEU-4 of (reference, candidate) pairs, 0 to 1: geometric mean of clipped n-gram precisions, n = 1 to 4,
/// times the brevity penalty; no smoothing (Papineni et al. 2002). Words are runs of letters and digits; every other
/// character that is not white space, and every ideograph or kana, is a word of its own. Orders for which the corpus
/// has no n-gram are left out, so that equal short texts score 1.
pub fn bleu<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> f64 {
    let mut matched = [0usize; 4];
    let mut total = [0usize; 4];
    let (mut reference_words, mut candidate_words) = (0, 0);
    for (reference, candidate) in pairs {
        let (reference, candidate) = (words(reference), words(candidate));
        reference_words += reference.len();
        candidate_words += candidate.len();
        for n in 1..=4 {
            let mut available: HashMap<&[&str], usize> = HashMap::new();
            for gram in reference.windows(n) {
                *available.entry(gram).or_default() += 1;
            }
            for gram in candidate.windows(n) {
                total[n - 1] += 1;
                if let Some(left) = available.get_mut(gram).filter(|left| **left > 0) {
                    *left -= 1;
                    matched[n - 1] += 1;
                }
            }
        }
    }
    if candidate_words == 0 {
        return if reference_words == 0 { 1.0 } else { 0.0 };
    }
    let orders = total.iter().filter(|&&total| total > 0).count();
    let logs: f64 = (0..orders).map(|n| (matched[n] as f64 / total[n] as f64).ln()).sum();
    let brevity = (1.0 - reference_words as f64 / candidate_words as f64).min(0.0);
    (brevity + logs / orders as f64).exp()
}

fn words(text: &str) -> Vec<&str> {
    let alone = |c: char| {
        !c.is_alphanumeric()
            || matches!(c, '\u{3040}'..='\u{30FF}' | '\u{3400}'..='\u{9FFF}' | '\u{F900}'..='\u{FAFF}' | '\u{20000}'..)
    };
    let mut words: Vec<Range<usize>> = Vec::new();
    let mut open = false;
    for (at, c) in text.char_indices().filter(|(_, c)| !c.is_whitespace()) {
        let end = at + c.len_utf8();
        match words.last_mut() {
            Some(word) if open && !alone(c) && word.end == at => word.end = end,
            _ => words.push(at..end),
        }
        open = !alone(c);
    }
    words.into_iter().map(|word| &text[word]).collect()
}

/// Levenshtein distance in characters. Works outward from the diagonal (Ukkonen 1985): time is the length times the
/// distance, so that near-equal long texts are cheap.
pub fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let longest = a.len().max(b.len());
    let mut limit = a.len().abs_diff(b.len()).max(8);
    loop {
        match distance_within(&a, &b, limit) {
            Some(distance) => return distance,
            None => limit = (limit * 2).min(longest),
        }
    }
}

/// The distance if it is at most `limit` (which is at least the difference in length).
fn distance_within(a: &[char], b: &[char], limit: usize) -> Option<usize> {
    const FAR: usize = usize::MAX / 2;
    // row[j] = distance of a[..i] to b[..j], for j within `limit` of i; FAR outside.
    let mut row: Vec<usize> = (0..=b.len()).map(|j| if j <= limit { j } else { FAR }).collect();
    for i in 1..=a.len() {
        let (low, high) = (i.saturating_sub(limit), b.len().min(i + limit));
        let mut diagonal = if low == 0 { row[0] } else { row[low - 1] };
        let mut left = FAR;
        if low == 0 {
            row[0] = i;
            left = i;
        } else {
            row[low - 1] = FAR;
        }
        for j in low.max(1)..=high {
            let substituted = diagonal + usize::from(a[i - 1] != b[j - 1]);
            diagonal = row[j];
            left = substituted.min(left + 1).min(diagonal + 1);
            row[j] = left;
        }
    }
    Some(row[b.len()]).filter(|&distance| distance <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances_are_those_of_the_full_table() {
        fn full(a: &[char], b: &[char]) -> usize {
            let mut row: Vec<usize> = (0..=b.len()).collect();
            for (i, x) in a.iter().enumerate() {
                let mut diagonal = std::mem::replace(&mut row[0], i + 1);
                for (j, y) in b.iter().enumerate() {
                    let best = (diagonal + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
                    diagonal = std::mem::replace(&mut row[j + 1], best);
                }
            }
            row[b.len()]
        }
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "北京"), 2);
        let mut state = 7u32;
        let mut random = |n: u32| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 16) % n
        };
        for _ in 0..300 {
            let [a, b] = [(); 2]
                .map(|_| (0..random(60)).map(|_| char::from(b'a' + random(4) as u8)).collect::<String>());
            let (x, y): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
            assert_eq!(edit_distance(&a, &b), full(&x, &y), "{a} / {b}");
        }
    }

    #[test]
    fn bleu_by_hand() {
        let one = |reference, candidate| bleu([(reference, candidate)]);
        assert_eq!(one("the cat sat on the mat", "the cat sat on the mat"), 1.0);
        assert_eq!(one("北京是中国的首都", "北京是中国的首都"), 1.0);
        assert_eq!((one("Hi", "Hi"), one("", ""), one("Hi", "")), (1.0, 1.0, 0.0));
        assert_eq!(one("a b c d", "w x y z"), 0.0);
        // Precisions 5/6, 4/5, 3/4, 2/3; equal length.
        let expected = (5.0f64 / 6.0 * 4.0 / 5.0 * 3.0 / 4.0 * 2.0 / 3.0).powf(0.25);
        assert!((one("a b c d e f", "a b c d e x") - expected).abs() < 1e-12);
        // All precisions 1, brevity penalty exp(1 - 8/4).
        assert!((one("a b c d e f g h", "a b c d") - (-1.0f64).exp()).abs() < 1e-12);
        // Clipping: "the" counts once per "the" of the reference; precision 2/4 and no bigram matches.
        assert_eq!(one("the cat the dog", "the the the the"), 0.0);
    }

    #[test]
    fn words_of_several_scripts() {
        assert_eq!(words("Don't stop, 3.5 km"), ["Don", "'", "t", "stop", ",", "3", ".", "5", "km"]);
        assert_eq!(words("北京 is カナ!"), ["北", "京", "is", "カ", "ナ", "!"]);
        assert_eq!(words("x东"), ["x", "东"]);
    }
}
