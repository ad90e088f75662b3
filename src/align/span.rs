//! `span`: alignment by place in the text.
//!
//! The sharer reads the text in its *own* tokenisation, so it never sees mangled text and nothing is lost in
//! translation. Each receiver token takes the sharer's cache column of the token that covers the receiver token's
//! last character: the first column that has read all of it.

/// Byte range `[start, end)` of a token in the text. Tokens of one character cut into bytes may each carry the whole
/// character's range.
pub type Offset = (usize, usize);

/// Answers which token of a text covers a place in it.
#[derive(Clone, Debug)]
pub struct Cover {
    /// Range and column of each token that covers text, in text order.
    tokens: Vec<(Offset, u32)>,
    /// Number of all tokens.
    columns: usize,
}

impl Cover {
    /// From the offsets of all tokens of a text, specials that cover nothing included.
    pub fn new(offsets: &[Offset]) -> Cover {
        let mut reached = (0, 0);
        let tokens = offsets
            .iter()
            .zip(0u32..)
            .filter(|((start, end), _)| start < end)
            .map(|(&(start, end), column)| {
                // Neither end ever goes back, even if a normaliser reordered what it read.
                reached = (start.max(reached.0), end.max(reached.1));
                (reached, column)
            })
            .collect();
        Cover { tokens, columns: offsets.len() }
    }

    /// The columns for tokens that end at `ends`, which never go back: for each the last token that covers the byte
    /// before the end, or where none does, the last token before it. `None` only if there are no tokens at all.
    ///
    /// Pieces of one character have equal ends. They are paired from the last one backwards, as far as this text has
    /// pieces of that character too: byte with byte, where both sides fall back to bytes.
    pub fn columns(&self, ends: &[usize]) -> Vec<Option<u32>> {
        let mut columns = vec![None; ends.len()];
        let mut pieces_behind = 0;
        for (i, &end) in ends.iter().enumerate().rev() {
            pieces_behind = if ends.get(i + 1) == Some(&end) { pieces_behind + 1 } else { 0 };
            let covering = &self.tokens[..self.tokens.partition_point(|((start, _), _)| *start < end)];
            let pieces =
                covering.iter().rev().take_while(|((_, stop), _)| *stop >= end).take(pieces_behind + 1);
            columns[i] = match pieces.last().or(covering.last()) {
                Some(&(_, column)) => Some(column),
                None => (self.columns > 0).then_some(0),
            };
        }
        columns
    }
}

/// For each receiver token the sharer's column, over two tokenisations of the same text.
///
/// Total (every receiver token has a column as long as the sharer has a token), in range and never decreasing; equal
/// tokenisations are aligned token by token. A receiver token that covers no text (a special that was added, a dummy
/// space) takes the column of the text read so far; at the very start that is column 0.
pub fn span_columns(receiver: &[Offset], sharer: &[Offset]) -> Vec<Option<u32>> {
    Cover::new(sharer).columns(&ends(receiver))
}

/// Where each token's reading has come to: its end, never going back.
pub(super) fn ends(offsets: &[Offset]) -> Vec<usize> {
    let mut reached = 0;
    offsets
        .iter()
        .map(|&(_, end)| {
            reached = end.max(reached);
            reached
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(receiver: &[Offset], sharer: &[Offset]) -> Vec<u32> {
        span_columns(receiver, sharer).into_iter().map(|c| c.expect("a column")).collect()
    }

    #[test]
    fn the_same_cuts_align_one_to_one() {
        let offsets = [(0, 5), (5, 6), (6, 11)];
        assert_eq!(columns(&offsets, &offsets), [0, 1, 2]);
    }

    #[test]
    fn a_token_takes_the_column_of_its_last_character() {
        // un|believ|able against unbe|liev|ab|le
        assert_eq!(columns(&[(0, 2), (2, 8), (8, 12)], &[(0, 4), (4, 8), (8, 10), (10, 12)]), [0, 1, 3]);
    }

    #[test]
    fn pieces_of_a_character_are_paired_from_the_last() {
        // One four-byte character: three pieces here, two there, each with the character's range.
        let here = [(0, 1), (1, 5), (1, 5), (1, 5), (5, 6)];
        let there = [(0, 1), (1, 5), (1, 5), (5, 6)];
        assert_eq!(columns(&here, &there), [0, 1, 1, 2, 3]);
        assert_eq!(columns(&there, &here), [0, 2, 3, 4]);
        assert_eq!(columns(&here, &here), [0, 1, 2, 3, 4]);
        // A whole character needs its last byte; so does a token that ends within it.
        assert_eq!(columns(&[(0, 5), (5, 6)], &here), [3, 4]);
        // Where pieces carry their own bytes, those count.
        assert_eq!(columns(&[(0, 2), (2, 4)], &[(0, 1), (1, 2), (2, 3), (3, 4)]), [1, 3]);
    }

    #[test]
    fn tokens_that_cover_nothing_follow_the_text() {
        // bos, text, eos on both sides; a post-processor gives its tokens the range (0, 0).
        let both = [(0, 0), (0, 3), (3, 7), (0, 0)];
        assert_eq!(columns(&both, &both), [0, 1, 2, 2]);
        assert_eq!(columns(&[(0, 0), (0, 3)], &[(0, 3)]), [0, 0]);
        assert_eq!(columns(&[(0, 3), (3, 3), (3, 4)], &[(0, 3), (3, 4)]), [0, 0, 1]);
    }

    #[test]
    fn text_the_sharer_drops_takes_the_column_before() {
        assert_eq!(columns(&[(0, 2), (2, 4), (4, 6)], &[(0, 2), (4, 6)]), [0, 0, 1]);
        assert_eq!(columns(&[(0, 2), (2, 4)], &[(2, 4)]), [0, 0]);
    }

    #[test]
    fn without_sharer_tokens_there_is_no_column() {
        assert_eq!(span_columns(&[(0, 1)], &[]), [None]);
        assert_eq!(span_columns(&[], &[(0, 1)]), []);
    }
}
