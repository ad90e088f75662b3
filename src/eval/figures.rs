//! Figures of a report, as SVG narrow enough for a phone.

use super::results::Row;
use plotters::{coord::Shift, prelude::*};

/// A figure that the plotting library refuses.
#[derive(Debug, thiserror::Error)]
#[error("a figure cannot be drawn: {0}")]
pub struct FigureError(String);

/// What a figure stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// Its own white: files.
    White,
    /// The page's, whose text colour it takes: light or dark.
    Page,
}

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Of most figures, in pixels.
pub(crate) const WIDTH: i32 = 440;
pub(crate) const INK: RGBColor = RGBColor(40, 40, 40);
/// Ways to answer, and controls; readable on white and on black.
pub(crate) const MODE: RGBColor = RGBColor(60, 125, 205);
pub(crate) const CONTROL: RGBColor = RGBColor(150, 150, 150);

/// The figure of `width` × `height` pixels that `draw` draws.
pub(crate) fn drawn(
    (width, height): (i32, i32),
    ground: Ground,
    draw: impl FnOnce(&Area) -> Drawn,
) -> Result<String, FigureError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        let begin = if ground == Ground::White { area.fill(&WHITE).map_err(Box::from) } else { Ok(()) };
        begin
            .and_then(|()| draw(&area))
            .map_err(|error: Box<dyn std::error::Error>| FigureError(error.to_string()))?;
        area.present().map_err(|error| FigureError(error.to_string()))?;
    }
    Ok(match ground {
        Ground::White => svg,
        Ground::Page => svg.replace("#282828", "currentColor"),
    })
}

pub(crate) fn label(size: i32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size)).color(&INK)
}

/// A rate with its interval.
pub(crate) struct Bar {
    pub name: String,
    pub rate: f64,
    pub low: f64,
    pub high: f64,
    /// Drawn grey: something to compare with.
    pub quiet: bool,
}

/// A bar a mode, with its interval.
pub fn accuracy(rows: &[&Row], ground: Ground) -> Result<String, FigureError> {
    let bar = |row: &&Row| Bar {
        name: row.mode.clone(),
        rate: row.accuracy(),
        low: row.low,
        high: row.high,
        quiet: row.control,
    };
    bars(&rows.iter().map(bar).collect::<Vec<_>>(), ground)
}

/// Bars of rates, one below the other.
pub(crate) fn bars(rows: &[Bar], ground: Ground) -> Result<String, FigureError> {
    const LEFT: i32 = 112;
    const RIGHT: i32 = WIDTH - 62;
    const STEP: i32 = 24;
    let x = |rate: f64| LEFT + (f64::from(RIGHT - LEFT) * rate).round() as i32;
    let height = 34 + STEP * rows.len() as i32;
    drawn((WIDTH, height), ground, |area| {
        let bottom = height - 26;
        for tenth in [0, 25, 50, 75, 100] {
            let at = x(f64::from(tenth) / 100.0);
            area.draw(&PathElement::new([(at, 4), (at, bottom)], INK.mix(0.18)))?;
            let text = if tenth == 100 { "100 %".into() } else { tenth.to_string() };
            area.draw(&Text::new(text, (at - 8, bottom + 6), label(15)))?;
        }
        for (row, number) in rows.iter().zip(0..) {
            let y = 8 + STEP * number;
            let colour = if row.quiet { CONTROL } else { MODE };
            area.draw(&Text::new(row.name.clone(), (4, y), label(16)))?;
            area.draw(&Rectangle::new([(LEFT, y), (x(row.rate), y + 14)], colour.filled()))?;
            let (low, high, middle) = (x(row.low), x(row.high), y + 7);
            area.draw(&PathElement::new([(low, middle), (high, middle)], INK.stroke_width(1)))?;
            for end in [low, high] {
                area.draw(&PathElement::new([(end, middle - 4), (end, middle + 4)], INK.stroke_width(1)))?;
            }
            let value = format!("{:.1} %", 100.0 * row.rate);
            area.draw(&Text::new(value, (RIGHT + 10, y), label(16)))?;
        }
        Ok(())
    })
}

/// Accuracy over the time of an answer, for ways to answer; `None` where fewer than two have a known time.
pub fn tradeoff(rows: &[&Row], ground: Ground) -> Result<Option<String>, FigureError> {
    let points: Vec<(f64, f64, &str)> = rows
        .iter()
        .filter(|row| !row.control && !row.mode.contains('@'))
        .filter_map(|row| Some((row.cost.total_ms?, 100.0 * row.accuracy(), row.mode.as_str())))
        .filter(|(time, _, _)| time.is_finite() && *time > 0.0)
        .collect();
    if points.len() < 2 {
        return Ok(None);
    }
    let slowest = points.iter().map(|(time, _, _)| *time).fold(0.0, f64::max);
    let svg = drawn((WIDTH, 300), ground, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(20)
            .x_label_area_size(38)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..slowest * 1.25, 0.0..104.0)?;
        chart
            .configure_mesh()
            .x_desc("ms from question to answer")
            .y_desc("accuracy, %")
            .label_style(label(15))
            .axis_desc_style(label(16))
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.15))
            .axis_style(INK.mix(0.6))
            .x_labels(6)
            .x_label_formatter(&|x| if slowest < 5.0 { format!("{x:.1}") } else { format!("{x:.0}") })
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        // Labels that would cover each other or a dot move down, line by line.
        let dots: Vec<(i32, i32)> =
            points.iter().map(|(time, accuracy, _)| chart.backend_coord(&(*time, *accuracy))).collect();
        let mut placed: Vec<(i32, i32)> = Vec::new();
        for (time, accuracy, name) in points {
            let (px, py) = chart.backend_coord(&(time, accuracy));
            let width = 8 * name.len() as i32 + 12;
            let mut y = py - 7;
            while placed.iter().any(|(x, other)| (x - px).abs() < width && (other - y).abs() < 14)
                || dots.iter().any(|(x, dot)| *x > px && x - px < width && (dot - y - 7).abs() < 10)
            {
                y += 14;
            }
            placed.push((px, y));
            area.draw(&Circle::new((px, py), 4, MODE.filled()))?;
            area.draw(&Text::new(name, (px + 8, y), label(16)))?;
        }
        Ok(())
    })?;
    Ok(Some(svg))
}
