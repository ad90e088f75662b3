//! Figures of findings, as SVG, readable on white and on black.

use crate::eval::figures::{Area, CONTROL, Drawn, FigureError, Ground, INK, MODE, WIDTH, drawn, label};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::ops::Range;

/// The Receiver's colour, the Sharer's, that of what is fused, and that of the rest: the same on all figures.
pub(super) const RECEIVER: RGBColor = MODE;
pub(super) const SHARER: RGBColor = RGBColor(214, 110, 20);
pub(super) const FUSED: RGBColor = RGBColor(40, 150, 90);
pub(super) const OTHER: RGBColor = CONTROL;

/// Numbers in rows and columns.
pub(super) struct Heat {
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    /// By row; `None` has no place on the scale.
    pub values: Vec<Vec<Option<f64>>>,
    /// What is drawn empty, and full.
    pub scale: Range<f64>,
    /// What columns are.
    pub across: &'static str,
}

/// Columns of a part: longer rows go on below.
const PART: usize = 48;

/// Squares, the fuller the larger the number; crossed out where there is none.
pub(super) fn heat(heat: &Heat, ground: Ground) -> Result<String, FigureError> {
    let longest = |names: &[String]| names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as i32;
    let left = 14 + 8 * longest(&heat.rows).max(4);
    let part = heat.columns.len().clamp(1, PART);
    let size = ((WIDTH.max(left + 14 * part as i32) - left - 10) / part as i32).clamp(14, 40);
    let upright = longest(&heat.columns) > 2;
    let feet = if upright { 12 + 8 * longest(&heat.columns) } else { 22 };
    let step = 22;
    let tall = step * heat.rows.len() as i32 + feet + 8;
    let parts = heat.columns.len().div_ceil(part).max(1) as i32;
    let width = (left + size * part as i32 + 10).max(WIDTH);
    drawn((width, tall * parts + 52), ground, |area| {
        for (number, columns) in heat.columns.chunks(part).enumerate() {
            let (first, top) = (number * part, 8 + tall * number as i32);
            for (row, (name, values)) in (0..).zip(heat.rows.iter().zip(&heat.values)) {
                let y = top + step * row;
                area.draw(&Text::new(name.clone(), (6, y + 3), label(15)))?;
                for column in 0..columns.len() {
                    let x = left + size * column as i32;
                    square(area, (x, y), (size - 1, step - 1), values[first + column], &heat.scale)?;
                }
            }
            let foot = top + step * heat.rows.len() as i32 + 4;
            for (column, name) in (0..).zip(columns) {
                let x = left + size * column + size / 2;
                let style = if upright {
                    label(14).transform(FontTransform::Rotate90).pos(Pos::new(HPos::Left, VPos::Center))
                } else {
                    label(14).pos(Pos::new(HPos::Center, VPos::Top))
                };
                area.draw(&Text::new(name.clone(), (x, foot), style))?;
            }
        }
        let y = tall * parts + 24;
        area.draw(&Text::new(heat.across, (6, y), label(15)))?;
        let (from, steps) = (width - 190, 24);
        for step in 0..steps {
            let strength = f64::from(step) / f64::from(steps - 1);
            let x = from + 4 * step;
            area.draw(&Rectangle::new([(x, y + 1), (x + 4, y + 15)], MODE.mix(strength).filled()))?;
        }
        let ends = [(from - 6, HPos::Right, heat.scale.start), (from + 102, HPos::Left, heat.scale.end)];
        for (x, side, value) in ends {
            area.draw(&Text::new(number(value), (x, y), label(15).pos(Pos::new(side, VPos::Top))))?;
        }
        Ok(())
    })
}

fn square(
    area: &Area,
    (x, y): (i32, i32),
    (w, h): (i32, i32),
    value: Option<f64>,
    scale: &Range<f64>,
) -> Drawn {
    let corners = [(x, y), (x + w, y + h)];
    match value {
        Some(value) => {
            let strength = (value - scale.start) / (scale.end - scale.start).max(f64::MIN_POSITIVE);
            area.draw(&Rectangle::new(corners, MODE.mix(strength.clamp(0.0, 1.0)).filled()))?;
        }
        None => {
            area.draw(&PathElement::new([(x + 3, y + h - 3), (x + w - 3, y + 3)], CONTROL.stroke_width(1)))?;
        }
    }
    area.draw(&Rectangle::new(corners, INK.mix(0.2)))?;
    Ok(())
}

/// As many digits as an axis needs.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    match text.trim_end_matches('0').trim_end_matches('.') {
        "-0" => "0".into(),
        text => text.into(),
    }
}

/// A line over the layers.
pub(super) struct Line {
    pub name: String,
    pub colour: RGBColor,
    /// By layer.
    pub values: Vec<Option<f64>>,
}

/// Lines over the Receiver's layers.
pub(super) fn lines(lines: &[Line], what: &str, ground: Ground) -> Result<String, FigureError> {
    let layers = lines.iter().map(|line| line.values.len()).max().unwrap_or(1).max(1);
    let all = || lines.iter().flat_map(|line| line.values.iter().flatten().copied());
    let top = all().fold(0.0, f64::max).max(1e-9) * 1.08;
    let bottom = all().fold(0.0, f64::min) * 1.08;
    let legend = 24 * lines.len().div_ceil(2) as i32;
    drawn((WIDTH, 300 + legend), ground, |area| {
        let (area, feet) = area.split_vertically(300);
        let last = (layers as f64 - 1.0).max(0.5);
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(38)
            .y_label_area_size(56)
            .build_cartesian_2d(-0.03 * last..1.03 * last, bottom..top)?;
        chart
            .configure_mesh()
            .x_desc("Receiver layer")
            .y_desc(what)
            .label_style(label(15))
            .axis_desc_style(label(16))
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.15))
            .axis_style(INK.mix(0.6))
            .x_labels(layers.min(10))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| number(*y))
            .draw()?;
        for line in lines {
            let points: Vec<(f64, f64)> = (0..)
                .zip(&line.values)
                .filter_map(|(layer, value)| Some((f64::from(layer), (*value)?)))
                .collect();
            chart.draw_series(LineSeries::new(points, line.colour.stroke_width(2)).point_size(3))?;
        }
        for (number, line) in (0..).zip(lines) {
            let (x, y) = (12 + 214 * (number % 2), 24 * (number / 2));
            feet.draw(&PathElement::new([(x, y + 9), (x + 18, y + 9)], line.colour.stroke_width(3)))?;
            feet.draw(&Text::new(line.name.clone(), (x + 24, y), label(16)))?;
        }
        Ok(())
    })
}

/// Points of one kind.
pub(super) struct Cloud {
    pub name: &'static str,
    pub colour: RGBColor,
    pub points: Vec<[f64; 2]>,
}

/// Side of one plane, in pixels.
const PLANE: i32 = 220;

/// Clouds of points, a plane for each title, two in a row.
pub(super) fn clouds(planes: &[(String, Vec<Cloud>)], ground: Ground) -> Result<String, FigureError> {
    let rows = planes.len().div_ceil(2) as i32;
    let names = planes.first().map_or(0, |(_, clouds)| clouds.len()) as i32;
    drawn((2 * PLANE, rows * PLANE + 24 * ((names + 1) / 2) + 8), ground, |area| {
        for (number, (title, clouds)) in (0..).zip(planes) {
            let (left, top) = (PLANE * (number % 2), PLANE * (number / 2));
            area.draw(&Text::new(title.clone(), (left + 8, top + 4), label(15)))?;
            let frame = [(left + 4, top + 24), (left + PLANE - 4, top + PLANE - 4)];
            area.draw(&Rectangle::new(frame, INK.mix(0.3)))?;
            let extent = |axis: usize| {
                let all = clouds.iter().flat_map(|cloud| cloud.points.iter().map(move |point| point[axis]));
                let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                    (low.min(value), high.max(value))
                });
                (low, (high - low).max(f64::MIN_POSITIVE))
            };
            let (x, y) = (extent(0), extent(1));
            let place = |value: f64, (low, size): (f64, f64), from: i32, to: i32| {
                from + ((value - low) / size * f64::from(to - from)).round() as i32
            };
            for cloud in clouds {
                for point in &cloud.points {
                    let at = (
                        place(point[0], x, frame[0].0 + 6, frame[1].0 - 6),
                        place(point[1], y, frame[0].1 + 6, frame[1].1 - 6),
                    );
                    area.draw(&Circle::new(at, 2, cloud.colour.mix(0.75).filled()))?;
                }
            }
        }
        for (number, cloud) in (0..).zip(planes.first().map_or(&[][..], |(_, clouds)| clouds)) {
            let (x, y) = (12 + PLANE * (number % 2), rows * PLANE + 4 + 24 * (number / 2));
            area.draw(&Circle::new((x + 6, y + 9), 5, cloud.colour.filled()))?;
            area.draw(&Text::new(cloud.name, (x + 20, y), label(16)))?;
        }
        Ok(())
    })
}

/// Three circles with how many lie in each region: of a bit for each circle, the first the lowest; 0 is outside.
pub(super) fn venn(names: [&str; 3], counts: [u64; 8], ground: Ground) -> Result<String, FigureError> {
    const CENTRES: [(i32, i32); 3] = [(170, 150), (270, 150), (220, 236)];
    drawn((WIDTH, 370), ground, |area| {
        for (centre, colour) in CENTRES.into_iter().zip([RECEIVER, SHARER, FUSED]) {
            area.draw(&Circle::new(centre, 92, colour.mix(0.3).filled()))?;
            area.draw(&Circle::new(centre, 92, colour.stroke_width(2)))?;
        }
        let middle = |size: i32| label(size).pos(Pos::new(HPos::Center, VPos::Center));
        let places = [(110, 110, 0), (330, 110, 1), (220, 345, 2)];
        for (x, y, circle) in places {
            let (x, y) = match circle {
                0 => (x - 40, y - 66),
                1 => (x + 40, y - 66),
                _ => (x, y),
            };
            area.draw(&Text::new(names[circle], (x, y), middle(17)))?;
        }
        let regions = [
            (0b001, (125, 128)),
            (0b010, (315, 128)),
            (0b100, (220, 288)),
            (0b011, (220, 112)),
            (0b101, (162, 212)),
            (0b110, (278, 212)),
            (0b111, (220, 178)),
            (0b000, (400, 330)),
        ];
        for (region, at) in regions {
            area.draw(&Text::new(counts[region].to_string(), at, middle(18)))?;
        }
        area.draw(&Text::new("none", (400, 350), middle(15)))?;
        Ok(())
    })
}
