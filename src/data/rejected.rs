//! Rows that cannot be used.

use super::Origin;
use std::{collections::BTreeMap, fmt};

/// Why a row cannot be used. Rows with equal reasons are counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Reason {
    #[error("cannot be read")]
    Unreadable,
    #[error("is no object with fields")]
    NotAnObject,
    #[error("has no field `{0}`")]
    Missing(&'static str),
    #[error("field `{field}` is not {expected}")]
    Type { field: &'static str, expected: &'static str },
    #[error("field `{0}` is empty")]
    Empty(&'static str),
    #[error("has a speaker that is neither system, user nor assistant")]
    Speaker,
    #[error("does not end with the assistant's message")]
    NoAnswer,
    #[error("does not have 2 to 26 choices")]
    ChoiceCount,
    #[error("its answer names none of the choices")]
    AnswerOutside,
}

/// A row that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {reason}{}", if detail.is_empty() { String::new() } else { format!(": {detail}") })]
pub struct BadRow {
    pub origin: Origin,
    pub reason: Reason,
    /// What this row in particular has; may be empty.
    pub detail: String,
}

/// How many rows were not used, why, and where the first of them are. Its text is a report of a line for each reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rejected {
    reasons: BTreeMap<Reason, (u64, Vec<BadRow>)>,
}

/// As many rows are named for each reason.
const NAMED: usize = 3;

impl Rejected {
    pub fn add(&mut self, row: BadRow) {
        let (count, first) = self.reasons.entry(row.reason.clone()).or_default();
        *count += 1;
        if first.len() < NAMED {
            first.push(row);
        }
    }

    pub fn count(&self) -> u64 {
        self.reasons.values().map(|(count, _)| count).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.reasons.is_empty()
    }

    /// For each reason the number of rows and the first of them.
    pub fn reasons(&self) -> impl Iterator<Item = (&Reason, u64, &[BadRow])> {
        self.reasons.iter().map(|(reason, (count, first))| (reason, *count, first.as_slice()))
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (reason, count, first)) in self.reasons().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{count} row{}: {reason} (", if count == 1 { "" } else { "s" })?;
            for (index, row) in first.iter().enumerate() {
                write!(f, "{}{}", if index > 0 { "; " } else { "" }, row.origin)?;
                if !row.detail.is_empty() {
                    write!(f, ": {}", row.detail)?;
                }
            }
            f.write_str(if count > first.len() as u64 { "; …)" } else { ")" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Place;

    #[test]
    fn rows_are_counted_by_reason_and_the_first_named() {
        let mut rejected = Rejected::default();
        for line in 1..=5 {
            let origin = Origin::new("a.jsonl", Place::Line(line));
            rejected.add(BadRow { origin, reason: Reason::Missing("question"), detail: String::new() });
        }
        let origin = Origin::new("b.parquet", Place::Row(7));
        rejected.add(BadRow { origin, reason: Reason::AnswerOutside, detail: "`F` of 4".into() });
        assert_eq!(rejected.count(), 6);
        assert_eq!(
            rejected.to_string(),
            "5 rows: has no field `question` (a.jsonl:1; a.jsonl:2; a.jsonl:3; …)\n\
             1 row: its answer names none of the choices (b.parquet, row 7: `F` of 4)"
        );
    }
}
