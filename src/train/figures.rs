//! The figures of a report, as SVG.

use super::{
    events::{Evaluation, Update},
    report::GateStrength,
};
use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
};
use std::ops::Range;

/// A figure that the plotting library refuses.
#[derive(Debug, thiserror::Error)]
#[error("a figure cannot be drawn: {0}")]
pub struct FigureError(String);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

// Told apart by brightness too, for those who print or see no colours.
const TRAINING: RGBColor = RGBColor(120, 160, 210);
const HELD_OUT: RGBColor = RGBColor(200, 60, 30);
const INK: RGBColor = RGBColor(40, 40, 40);

const TEXT: (&str, i32) = ("sans-serif", 14);

fn drawn(
    width: u32,
    height: u32,
    draw: impl FnOnce(&Area) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<String, FigureError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        let filled = area.fill(&WHITE).map_err(Box::from);
        filled.and_then(|()| draw(&area)).map_err(|error| FigureError(error.to_string()))?;
        area.present().map_err(|error| FigureError(error.to_string()))?;
    }
    Ok(svg)
}

type Points = Vec<(f64, f64)>;

/// The points that have a place.
fn finite(points: impl Iterator<Item = (f64, f64)>) -> Points {
    points.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
}

/// What an axis shows: all values with some air, and never nothing.
fn extent(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    let air = if high > low { 0.05 * (high - low) } else { 0.5 * low.abs().max(1e-12) };
    low - air..high + air
}

/// Lines over the updates, each with its name and colour.
fn curves(
    area: &Area,
    name: &str,
    lines: &[(&str, RGBColor, Points)],
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let x = extent(points().map(|(x, _)| *x));
    let y = extent(points().map(|(_, y)| *y));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d::<Range<f64>, Range<f64>>(x, y)?;
    axes(&mut chart, name)?;
    for (name, colour, points) in lines.iter().filter(|(_, _, points)| !points.is_empty()) {
        let style = colour.stroke_width(2);
        let drawn = chart.draw_series(LineSeries::new(points.iter().copied(), style).point_size(
            // A line through one point shows nothing.
            if points.len() < 50 { 3 } else { 0 },
        ))?;
        drawn.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .label_font(TEXT)
        .background_style(WHITE.mix(0.8))
        .border_style(INK.mix(0.3))
        .draw()?;
    Ok(())
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn axes(chart: &mut Chart, name: &str) -> Result<(), Box<dyn std::error::Error>> {
    chart
        .configure_mesh()
        .x_desc("updates")
        .y_desc(name)
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.6))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| number(*y))
        .draw()?;
    Ok(())
}

/// As many digits as are worth reading.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (0.01..10_000.0).contains(&size) => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.1e}"),
    }
}

/// The loss in training, update by update, and on held-out data.
pub fn loss(updates: &[Update], evaluations: &[Evaluation]) -> Result<String, FigureError> {
    let training = finite(updates.iter().map(|update| (update.step as f64, update.loss)));
    let held_out = finite(evaluations.iter().map(|evaluation| (evaluation.step as f64, evaluation.loss)));
    drawn(760, 380, |area| {
        let lines = [("training", TRAINING, training), ("held out", HELD_OUT, held_out)];
        curves(area, "nats a token", &lines)
    })
}

/// Learning rate and temperature, one above the other.
pub fn schedule(updates: &[Update]) -> Result<String, FigureError> {
    let rate = finite(updates.iter().map(|update| (update.step as f64, update.learning_rate)));
    let temperature =
        finite(updates.iter().filter_map(|update| Some((update.step as f64, update.temperature?))));
    let lines = [("learning rate", INK, rate), ("temperature", HELD_OUT, temperature)];
    let present: Vec<_> = lines.into_iter().filter(|(_, _, points)| !points.is_empty()).collect();
    drawn(760, 220 * present.len().max(1) as u32, |area| {
        for (part, line) in area.split_evenly((present.len().max(1), 1)).iter().zip(present) {
            let name = line.0;
            curves(part, name, &[line])?;
        }
        Ok(())
    })
}

/// Which of a layer's two.
type Logit = fn(&GateStrength) -> f32;

/// A row for keys, one for values, a column for each receiver layer: blue where open, grey where closed, stronger the
/// larger the logit.
pub fn gates(gates: &[GateStrength]) -> Result<String, FigureError> {
    let (left, top, size) = (70, 20, (880 / gates.len().max(1) as i32).clamp(6, 28));
    let width = left + size * gates.len() as i32 + 20;
    let largest = gates
        .iter()
        .flat_map(|gate| [gate.key_logit, gate.value_logit])
        .filter(|logit| logit.is_finite())
        .fold(f32::MIN_POSITIVE, |largest, logit| largest.max(logit.abs()));
    drawn(width.max(240) as u32, (top + 2 * size + 52) as u32, |area| {
        let text = TextStyle::from(TEXT).color(&INK);
        let rows: [(&str, Logit); 2] = [("keys", |gate| gate.key_logit), ("values", |gate| gate.value_logit)];
        for (row, (name, logit)) in (0..).zip(rows) {
            let y = top + row * size;
            area.draw(&Text::new(name, (12, y + size / 2 - 7), text.clone()))?;
            for (layer, gate) in (0..).zip(gates) {
                let logit = logit(gate);
                let strength =
                    if logit.is_finite() { f64::from(0.25 + 0.75 * logit.abs() / largest) } else { 1.0 };
                let colour = match logit {
                    _ if logit.is_nan() => HELD_OUT,
                    _ if logit > 0.0 => RGBColor(30, 90, 170),
                    _ => RGBColor(170, 170, 170),
                };
                let x = left + layer * size;
                let corners = [(x, y), (x + size - 1, y + size - 1)];
                area.draw(&Rectangle::new(corners, colour.mix(strength).filled()))?;
            }
        }
        let every = if size < 20 { 5 } else { 1 };
        for layer in (0..gates.len() as i32).step_by(every) {
            let place = (left + layer * size + 2, top + 2 * size + 6);
            area.draw(&Text::new(layer.to_string(), place, TextStyle::from(("sans-serif", 11)).color(&INK)))?;
        }
        area.draw(&Text::new("receiver layer", (left, top + 2 * size + 24), text))?;
        Ok(())
    })
}
