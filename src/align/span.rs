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
    /// Start and column of each token that covers text, in text order.
    starts: Vec<(usize, u32)>,
    tokens: usize,
}

impl Cover {
    /// From the offsets of all tokens of a text, specials that cover nothing included.
    pub fn new(offsets: &[Offset]) -> Cover {
        let mut reached = 0;
        let starts = offsets
            .iter()
            .zip(0u32..)
            .filter(|((start, end), _)| start < end)
            .map(|(&(start, _), column)| {
                // Starts never go back, even if a normaliser reordered what it read.
                reached = reached.max(start);
                (reached, column)
            })
            .collect();
        Cover { starts, tokens: offsets.len() }
    }

    /// The token that covers the byte before `end`: of several (a character cut into bytes) the last, and where no
    /// token covers that byte, the last token before it. `None` only if there are no tokens at all.
    pub fn column(&self, end: usize) -> Option<u32> {
        let before = self.starts.partition_point(|&(start, _)| start < end);
        match before.checked_sub(1) {
            Some(i) => Some(self.starts[i].1),
            None => (self.tokens > 0).then_some(0),
        }
    }
}

/// For each receiver token the sharer's column, over two tokenisations of the same text.
///
/// Total (every receiver token has a column as long as the sharer has a token), in range and never decreasing. A
/// receiver token that covers no text (a special that was added, a dummy space) takes the column of the text read so
/// far; at the very start that is column 0.
pub fn span_columns(receiver: &[Offset], sharer: &[Offset]) -> Vec<Option<u32>> {
    let cover = Cover::new(sharer);
    ends(receiver).map(|end| cover.column(end)).collect()
}

/// Where each token's reading has come to: its end, never going back.
pub(super) fn ends(offsets: &[Offset]) -> impl Iterator<Item = usize> {
    offsets.iter().scan(0, |reached, &(_, end)| {
        *reached = end.max(*reached);
        Some(*reached)
    })
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
    fn of_a_character_in_bytes_the_last_token_counts() {
        // One four-byte character: three fragments here, two there, each with the character's range.
        assert_eq!(columns(&[(0, 1), (1, 5), (1, 5), (1, 5), (5, 6)], &[(0, 1), (1, 5), (1, 5), (5, 6)]), [
            0, 2, 2, 2, 3
        ]);
        // The same where fragments carry bytes.
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
