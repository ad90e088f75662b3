//! Who answers, and the controls that tell communication from anything else.

use super::Error;
use crate::align::{Fraction, Portion};
use std::{fmt, str::FromStr};

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Receiver,
    /// Which of the Sharers, counted from 0.
    Sharer(usize),
    /// Text-to-text: the first Sharer writes background, the Receiver reads it.
    T2t(Background),
    /// The Receiver or the first Sharer, whom a classifier picks for each question.
    Router,
    /// The Receiver on a cache fused with all Sharers', or with one.
    C2c {
        sharer: Option<usize>,
        variant: Variant,
    },
    /// C2C where the Sharer is the Receiver itself, through a fuser of its own.
    Identical,
}

/// The published requests of text-to-text's first stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// "In one clear sentence, describe …": the published recipe's.
    Sentence,
    /// "Briefly describe …": the published program's default.
    Brief,
}

/// What the fuser is given, and how its gates are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Variant {
    /// The Sharer's cache of the question; gates as trained.
    Plain,
    /// The Sharer's cache of the question before, which is at hand.
    Swap,
    /// A cache of zeros.
    Zero,
    /// Normal noise with mean and deviation of each layer's own keys and values.
    Random,
    /// The Sharer's columns in another order.
    Shuffle,
    /// The Sharer's cache of one text that is the same for all questions.
    Generic,
    /// All gates open.
    Open,
    /// All gates closed.
    Closed,
    /// A part of the prompt is fused.
    Fraction(Fraction),
}

const CONTROLS: [(&str, Variant); 7] = [
    ("swap", Variant::Swap),
    ("zero", Variant::Zero),
    ("random", Variant::Random),
    ("shuffle", Variant::Shuffle),
    ("generic", Variant::Generic),
    ("open", Variant::Open),
    ("closed", Variant::Closed),
];

/// What the Sharer reads in [`Variant::Generic`].
pub const GENERIC: &str = "Please read the following carefully and then answer as well as you can. Think about what is asked, recall what \
     you know about the subject, compare all of the given options with each other, and choose the one that fits best.";

/// How modes are written.
pub const SYNTAX: &str = "receiver, sharer[:N], t2t, t2t-brief, router, identical, c2c[:N], c2c-swap, c2c-zero, c2c-random, \
     c2c-shuffle, c2c-generic, c2c-open, c2c-closed, c2c@front:F, c2c@back:F, or controls for all seven c2c-…";

impl Mode {
    /// A list with commas, where `controls` stands for all controls.
    pub fn list(text: &str) -> Result<Vec<Mode>, Error> {
        let mut modes: Vec<Mode> = Vec::new();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let named = match name {
                "controls" => CONTROLS.map(|(_, variant)| Mode::C2c { sharer: None, variant }).to_vec(),
                name => vec![name.parse()?],
            };
            // Naming one twice is no reason to ask twice.
            named.into_iter().for_each(|mode| {
                if !modes.contains(&mode) {
                    modes.push(mode);
                }
            });
        }
        if modes.is_empty() { Err(Error::UnknownMode { name: text.into() }) } else { Ok(modes) }
    }

    pub const C2C: Mode = Mode::C2c { sharer: None, variant: Variant::Plain };

    /// Whether it says what a gain is due to, rather than being a way to answer.
    pub fn is_control(&self) -> bool {
        matches!(self, Mode::C2c { variant, .. } if CONTROLS.iter().any(|(_, control)| control == variant))
    }

    pub fn fuses(&self) -> bool {
        matches!(self, Mode::C2c { .. })
    }

    /// How many Sharers it takes part of, at least.
    pub fn sharers(&self) -> usize {
        match self {
            Mode::Receiver | Mode::Identical => 0,
            Mode::Sharer(index) => index + 1,
            Mode::T2t(_) | Mode::Router => 1,
            Mode::C2c { sharer, .. } => sharer.map_or(1, |index| index + 1),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Receiver => f.write_str("receiver"),
            Mode::Sharer(0) => f.write_str("sharer"),
            Mode::Sharer(index) => write!(f, "sharer:{}", index + 1),
            Mode::T2t(Background::Sentence) => f.write_str("t2t"),
            Mode::T2t(Background::Brief) => f.write_str("t2t-brief"),
            Mode::Router => f.write_str("router"),
            Mode::Identical => f.write_str("identical"),
            Mode::C2c { sharer, variant } => {
                f.write_str("c2c")?;
                if let Some((name, _)) = CONTROLS.iter().find(|(_, control)| control == variant) {
                    write!(f, "-{name}")?;
                }
                if let Variant::Fraction(fraction) = variant {
                    write!(f, "@{fraction}")?;
                }
                sharer.map_or(Ok(()), |index| write!(f, ":{}", index + 1))
            }
        }
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Mode, Error> {
        let unknown = || Error::UnknownMode { name: text.into() };
        let number = |digits: &str| match digits.parse::<usize>() {
            Ok(number @ 1..=32) => Ok(number - 1),
            _ => Err(unknown()),
        };
        if let Some(fraction) = text.strip_prefix("c2c@") {
            let fraction: Fraction = fraction.parse().map_err(|_| unknown())?;
            return Ok(Mode::C2c { sharer: None, variant: Variant::Fraction(fraction) });
        }
        let (name, which) = match text.split_once(':') {
            Some((name, digits)) => (name, Some(number(digits)?)),
            None => (text, None),
        };
        let mode = match name {
            "sharer" => Mode::Sharer(which.unwrap_or(0)),
            "c2c" => Mode::C2c { sharer: which, variant: Variant::Plain },
            _ if name.starts_with("c2c-") => {
                let control =
                    CONTROLS.iter().find(|(control, _)| name[4..] == **control).ok_or_else(unknown)?;
                Mode::C2c { sharer: which, variant: control.1 }
            }
            _ if which.is_some() => return Err(unknown()),
            "receiver" => Mode::Receiver,
            "t2t" => Mode::T2t(Background::Sentence),
            "t2t-brief" => Mode::T2t(Background::Brief),
            "router" => Mode::Router,
            "identical" => Mode::Identical,
            _ => return Err(unknown()),
        };
        Ok(mode)
    }
}

/// The modes of a sweep over fused parts of the prompt, from both ends.
pub fn fractions(shares: &[f64]) -> Vec<Mode> {
    let of = |portion: Portion| shares.iter().filter_map(move |&share| Fraction::new(share, portion).ok());
    let all = of(Portion::Front).chain(of(Portion::Back));
    all.map(|fraction| Mode::C2c { sharer: None, variant: Variant::Fraction(fraction) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let text = "receiver,sharer,sharer:2,t2t,t2t-brief,router,identical,c2c,c2c:2,controls,c2c@front:0.5,c2c@back:0.25,c2c-swap";
        let modes = Mode::list(text).unwrap();
        assert_eq!(modes.len(), 18);
        for mode in &modes {
            assert_eq!(mode.to_string().parse::<Mode>().unwrap(), *mode, "{mode}");
        }
        assert_eq!(modes.iter().filter(|mode| mode.is_control()).count(), 7);
        for wrong in ["", "c2c-", "c2c:0", "receiver:1", "c2c@2", "sharer:x", "all"] {
            let error = Mode::list(wrong).unwrap_err().to_string();
            assert!(error.contains("c2c-shuffle"), "{error}");
        }
    }
}
