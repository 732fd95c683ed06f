//! The results as a chart: how much of plain connections' speed remains, and the resources that the proxies use.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::loads::{Better, row, title_of};
use super::number::number;
use super::results::Results;
use super::system::System;

/// Draws the chart as SVG. It needs direct, Envoy and ours; rows that were not measured are omitted.
///
/// # Errors
/// If drawing fails.
pub(super) fn svg(results: &Results, systems: &[System], footer: &str) -> Result<String> {
    let systems: Vec<System> = systems
        .iter()
        .copied()
        .filter(|system| system.has_proxies())
        .collect();
    let mut sections = Vec::new();
    for (heading, part, keys) in [
        (
            "Speed, as a share of plain connections' (longer is better)",
            Part::Speed,
            &SPEED[..],
        ),
        (
            "What the proxies take, as a share of Envoy's (shorter is better)",
            Part::Price,
            &PRICE[..],
        ),
    ] {
        let rows: Vec<Bars> = keys
            .iter()
            .filter_map(|key| Bars::new(results, &systems, key, part))
            .collect();
        if !rows.is_empty() {
            sections.push((heading, rows));
        }
    }
    let rows: usize = sections.iter().map(|(_, rows)| rows.len()).sum();
    let row = GAP + THICK * systems.len() as i32;
    let height = TOP + row * rows as i32 + SECTION * sections.len() as i32 + BOTTOM;
    let mut text = String::new();
    {
        let area =
            SVGBackend::with_string(&mut text, (WIDTH as u32, height as u32)).into_drawing_area();
        let picture = Picture {
            area: &area,
            systems: &systems,
            row,
        };
        let drawn = picture.all(&sections, footer, height);
        drawn.map_err(|error| anyhow!("drawing the chart: {error}"))?;
        area.present()
            .map_err(|error| anyhow!("drawing the chart: {error}"))?;
    }
    Ok(text)
}

/// The reference of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Direct is 1.
    Speed,
    /// Envoy is 1.
    Price,
}

/// A row of the chart.
#[derive(Debug, PartialEq)]
struct Bars {
    title: String,
    bars: Vec<(System, f64, String)>,
}

impl Bars {
    fn new(results: &Results, systems: &[System], key: &'static str, part: Part) -> Option<Self> {
        let row = row(key)?;
        let base = match part {
            Part::Speed => System::Direct,
            Part::Price => System::Envoy,
        };
        let mut bars = Vec::new();
        for system in systems.iter().copied() {
            let slower = part == Part::Speed && row.better == Better::Less;
            let ratio = if slower {
                results.ratio(key, base, system)
            } else {
                results.ratio(key, system, base)
            };
            let summary = results.summary(key, system)?;
            let label = format!("{:.2} · {} {}", ratio?, number(summary.median), row.unit);
            bars.push((system, ratio?, label));
        }
        let title = title_of(key);
        // Of prices there is one group.
        let short = match part {
            Part::Speed => &title,
            Part::Price => title.split_once(": ").map_or(&*title, |(_, short)| short),
        };
        Some(Self {
            title: short.to_owned(),
            bars,
        })
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

struct Picture<'a, 'b> {
    area: &'a Area<'b>,
    systems: &'a [System],
    /// The height of a row.
    row: i32,
}

impl Picture<'_, '_> {
    fn all(&self, sections: &[(&str, Vec<Bars>)], footer: &str, height: i32) -> Drawn {
        self.area.fill(&WHITE).map_err(|error| error.to_string())?;
        self.legend()?;
        let mut y = TOP;
        for (heading, rows) in sections {
            self.text(
                heading,
                (MARGIN, y + SECTION / 2),
                HPos::Left,
                HEADING,
                BLACK,
            )?;
            y += SECTION;
            let end = y + self.row * rows.len() as i32;
            for tenths in (0..=10).step_by(2) {
                let x = BARS + FULL * tenths / 10;
                let color = if tenths == 10 { DARK } else { LIGHT };
                self.line((x, y), (x, end), color)?;
            }
            let one = (BARS + FULL, y - NORMAL / 2);
            self.text("1", one, HPos::Center, SMALL, DARK)?;
            for row in rows {
                self.row(row, y)?;
                y += self.row;
            }
        }
        self.text(
            footer,
            (MARGIN, height - BOTTOM / 2),
            HPos::Left,
            SMALL,
            DARK,
        )
    }

    fn legend(&self) -> Drawn {
        let y = TOP / 2;
        let mut x = MARGIN;
        for system in self.systems {
            self.bar((x, y - 6), (x + 12, y + 6), color(*system))?;
            self.text(system.title(), (x + 18, y), HPos::Left, NORMAL, BLACK)?;
            x += 150;
        }
        Ok(())
    }

    fn row(&self, row: &Bars, y: i32) -> Drawn {
        self.text(
            &row.title,
            (BARS - 10, y + self.row / 2),
            HPos::Right,
            NORMAL,
            BLACK,
        )?;
        for ((system, ratio, label), number) in row.bars.iter().zip(0..) {
            let top = y + GAP / 2 + number * THICK;
            // Whatever the value is, the label must fit beside its bar.
            let length = (f64::from(FULL) * ratio.clamp(0.0, 1.25)) as i32;
            self.bar(
                (BARS, top),
                (BARS + length, top + THICK - 2),
                color(*system),
            )?;
            let beside = (BARS + length + 6, top + THICK / 2 - 1);
            self.text(label, beside, HPos::Left, SMALL, BLACK)?;
        }
        Ok(())
    }

    fn bar(&self, from: (i32, i32), to: (i32, i32), color: RGBColor) -> Drawn {
        let bar = Rectangle::new([from, to], color.filled());
        Ok(self.area.draw(&bar).map_err(|error| error.to_string())?)
    }

    fn line(&self, from: (i32, i32), to: (i32, i32), color: RGBColor) -> Drawn {
        let line = PathElement::new([from, to], color.stroke_width(1));
        Ok(self.area.draw(&line).map_err(|error| error.to_string())?)
    }

    fn text(&self, text: &str, at: (i32, i32), side: HPos, size: i32, color: RGBColor) -> Drawn {
        let style = ("sans-serif", size)
            .into_text_style(self.area)
            .color(&color)
            .pos(Pos::new(side, VPos::Center));
        let drawn = self.area.draw_text(text, &style, at);
        Ok(drawn.map_err(|error| error.to_string())?)
    }
}

fn color(system: System) -> RGBColor {
    match system {
        System::Direct => DARK,
        System::Envoy => RGBColor(0xb0, 0xb7, 0xc3),
        System::Ztunnel => RGBColor(0x8a, 0xa8, 0x6f),
        System::Ours => RGBColor(0x1f, 0x6f, 0xb4),
        System::Hbone => RGBColor(0x7f, 0xb2, 0xdd),
        System::Unobserved => RGBColor(0xb5, 0xcf, 0xe8),
    }
}

const SPEED: [&str; 13] = [
    "stream",
    "streams-8",
    "keep-alive-32",
    "keep-alive-1-p50",
    "connections-32",
    "set-up-p50",
    "node-stream",
    "node-keep-alive-32",
    "node-keep-alive-1-p50",
    "node-connections-32",
    "outside-stream",
    "outside-keep-alive-32",
    "outside-keep-alive-1-p50",
];
const PRICE: [&str; 6] = [
    "stream-cpu",
    "connections-32-cpu",
    "idle-client",
    "idle-server",
    "memory-client",
    "memory-server",
];
// In pixels.
const WIDTH: i32 = 1080;
const MARGIN: i32 = 16;
const TOP: i32 = 44;
const BOTTOM: i32 = 36;
const SECTION: i32 = 40;
/// Distance between the bars of two rows.
const GAP: i32 = 12;
const THICK: i32 = 14;
/// Start of the bars.
const BARS: i32 = 440;
/// Length of a bar of value 1.
const FULL: i32 = 400;
const HEADING: i32 = 16;
const NORMAL: i32 = 13;
const SMALL: i32 = 12;
const DARK: RGBColor = RGBColor(0x60, 0x60, 0x60);
const LIGHT: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_about_a_row() {
        for key in SPEED.iter().chain(&PRICE) {
            assert!(row(key).is_some(), "{key}");
        }
    }

    #[test]
    fn what_takes_twice_as_long_is_half_as_fast() {
        let mut results = Results::default();
        for (system, value) in [
            (System::Direct, 40.0),
            (System::Envoy, 160.0),
            (System::Ours, 80.0),
        ] {
            results.add("keep-alive-1-p50", system, 0, value);
        }
        let systems = [System::Direct, System::Envoy, System::Ours];
        let bars = Bars::new(&results, &systems[1..], "keep-alive-1-p50", Part::Speed).unwrap();
        let ratios: Vec<f64> = bars.bars.iter().map(|(_, ratio, _)| *ratio).collect();
        assert_eq!(ratios, [0.25, 0.5]);
        assert_eq!(
            Bars::new(&results, &systems[1..], "stream", Part::Speed),
            None
        );
        let svg = svg(&results, &systems, "on this machine").unwrap();
        assert!(
            svg.contains("80.0 µs") && svg.contains("on this machine"),
            "{svg}"
        );
    }
}
