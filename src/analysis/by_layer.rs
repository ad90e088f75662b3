//! Accuracies of one thing done to several sets of layers, told from chance.

use super::{
    Error,
    finding::{Table, rounded},
};
use crate::eval::{
    figures::Bar,
    statistics::{mcnemar, paired_bootstrap, wilson},
};
use serde_json::{Value, json};

/// Which of a sample's questions were answered right.
#[derive(Clone, Debug)]
pub(super) struct Scored {
    pub name: String,
    pub right: Vec<bool>,
    /// Something to compare with.
    pub quiet: bool,
}

impl Scored {
    /// Asks every question of `sample`.
    pub fn of(
        name: &str,
        sample: &[usize],
        mut ask: impl FnMut(usize) -> Result<bool, Error>,
    ) -> Result<Scored, Error> {
        let right = sample.iter().map(|&index| ask(index)).collect::<Result<_, _>>()?;
        Ok(Scored { name: name.into(), right, quiet: false })
    }

    pub fn quiet(self) -> Scored {
        Scored { quiet: true, ..self }
    }

    pub fn count(&self) -> u64 {
        self.right.iter().filter(|right| **right).count() as u64
    }

    pub fn rate(&self) -> f64 {
        self.count() as f64 / self.right.len().max(1) as f64
    }

    /// The same of every second question, from `first`.
    fn half(&self, first: usize) -> Scored {
        Scored { right: self.right.iter().skip(first).step_by(2).copied().collect(), ..self.clone() }
    }

    pub fn bar(&self) -> Bar {
        let (low, high) = wilson(self.count(), self.right.len() as u64);
        Bar { name: self.name.clone(), rate: self.rate(), low, high, quiet: self.quiet }
    }

    /// How much better than `base` on the same questions: points, their interval, p.
    pub fn versus(&self, base: &Scored) -> (f64, f64, f64, f64) {
        let differences: Vec<i8> =
            self.right.iter().zip(&base.right).map(|(own, base)| i8::from(*own) - i8::from(*base)).collect();
        let count =
            |wanted: i8| differences.iter().filter(|difference| **difference == wanted).count() as u64;
        let (low, high) = paired_bootstrap(&differences, 0);
        let (better, worse) = (count(1), count(-1));
        let difference = (better as f64 - worse as f64) / differences.len().max(1) as f64;
        (difference, low, high, mcnemar(better, worse))
    }
}

/// A table of accuracies, each against the first.
pub(super) fn table(name: &str, caption: &str, what: &str, scored: &[Scored]) -> Table {
    let against = scored.first().map_or(String::new(), |base| format!("vs {}", base.name));
    let head = [what, "right", "asked", "accuracy, %", "from", "to", &against, "from", "to", "p"];
    let mut table = Table::new(name, caption, &head);
    for (number, own) in scored.iter().enumerate() {
        let bar = own.bar();
        let points = |rate: f64| rounded(100.0 * rate);
        let versus = match number {
            0 => [(); 4].map(|()| Value::Null),
            _ => {
                let (difference, low, high, p) = own.versus(&scored[0]);
                [points(difference), points(low), points(high), rounded(p)]
            }
        };
        let [difference, from, to, p] = versus;
        table.push([
            json!(own.name),
            json!(own.count()),
            json!(own.right.len()),
            points(bar.rate),
            points(bar.low),
            points(bar.high),
            difference,
            from,
            to,
            p,
        ]);
    }
    table
}

/// How many layers the best and the worst are tried with.
const COUNTS: [usize; 10] = [1, 2, 5, 10, 15, 20, 25, 30, 40, 60];

/// Layers to which a thing is done.
pub(super) type Set = Vec<bool>;

/// Does it to the layers of each set in turn, and tells whether each answer to a question is right.
type Ask<'a> = dyn FnMut(usize, &[Set]) -> Result<Vec<bool>, Error> + 'a;

/// Asks every question of `sample` with each of the sets, all sets of a question at once.
fn asked(names: Vec<String>, sets: &[Set], sample: &[usize], ask: &mut Ask) -> Result<Vec<Scored>, Error> {
    let scored = |name| Scored { name, right: Vec::new(), quiet: false };
    let mut all: Vec<Scored> = names.into_iter().map(scored).collect();
    for &index in sample {
        all.iter_mut().zip(ask(index, sets)?).for_each(|(own, right)| own.right.push(right));
    }
    Ok(all)
}

/// How many times a sweep over so many questions asks.
pub(super) fn asks(questions: usize) -> usize {
    questions + questions / 2
}

/// A thing done to no layer, to each by itself, to all, and to the best and the worst of them.
pub(super) struct Sweep {
    pub none: Scored,
    pub single: Vec<Scored>,
    pub all: Scored,
    /// On the other half of the questions than layers were ranked by: none, all, best and worst.
    pub chosen: Vec<Scored>,
    /// Layers, the best first.
    pub order: Vec<usize>,
}

/// Best and worst layers are those of every second question of `sample`; their accuracy is that of the others, which had no say.
pub(super) fn sweep(layers: usize, sample: &[usize], ask: &mut Ask) -> Result<Sweep, Error> {
    let with = |chosen: &[usize]| -> Set { (0..layers).map(|layer| chosen.contains(&layer)).collect() };
    let every: Vec<usize> = (0..layers).collect();
    let names = every.iter().map(|layer| format!("layer {layer}")).chain(["none".into(), "all".into()]);
    let sets: Vec<Set> = every.iter().map(|&layer| with(&[layer])).chain([with(&[]), with(&every)]).collect();
    let mut single = asked(names.collect(), &sets, sample, ask)?;
    let ends = single.split_off(layers);
    let [none, all] = [ends[0].clone().quiet(), ends[1].clone()];
    let mut order = every;
    // A stable order: equal layers stay in theirs.
    order.sort_by_key(|&layer| std::cmp::Reverse(single[layer].half(0).count()));
    let others: Vec<usize> = sample.iter().skip(1).step_by(2).copied().collect();
    let (mut names, mut sets) = (Vec::new(), Vec::new());
    for count in COUNTS.into_iter().filter(|&count| count < layers) {
        for (name, layers) in [("best", &order[..count]), ("worst", &order[layers - count..])] {
            names.push(format!("{name} {count}"));
            sets.push(with(layers));
        }
    }
    let mut chosen = vec![none.half(1), all.half(1)];
    chosen.extend(asked(names, &sets, &others, ask)?);
    Ok(Sweep { none, single, all, chosen, order })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layer 2 alone decides; layer 0 undoes it.
    #[test]
    fn a_sweep_finds_the_layer_that_matters() {
        let sample: Vec<usize> = (0..40).collect();
        let mut asked = 0;
        let mut ask = |index: usize, sets: &[Set]| {
            asked += 1;
            Ok(sets.iter().map(|set| set[2] && !set[0] || index.is_multiple_of(4)).collect())
        };
        let sweep = sweep(3, &sample, &mut ask).unwrap();
        assert_eq!(asked, asks(sample.len()));
        assert_eq!(sweep.none.count(), 10);
        assert_eq!(sweep.single.iter().map(Scored::count).collect::<Vec<_>>(), [10, 10, 40]);
        assert_eq!(sweep.all.count(), 10);
        assert_eq!(sweep.order, [2, 0, 1]);
        let of = |name: &str| sweep.chosen.iter().find(|scored| scored.name == name).unwrap().rate();
        // Every fourth is an even number: of the half that had no say, none is right by itself.
        assert_eq!((of("none"), of("best 1"), of("best 2"), of("worst 2")), (0.0, 1.0, 0.0, 0.0));
        let (difference, low, _, p) = sweep.single[2].versus(&sweep.none);
        assert!(difference == 0.75 && low > 0.5 && p < 1e-6);
    }
}
