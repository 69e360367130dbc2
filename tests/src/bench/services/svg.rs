//! One plot: lines over sizes, names at their ends. Pure.
//!
//! The document stands by itself and inside of HTML: colours of text and lines follow the reader's
//! light or dark scheme by CSS, and nothing is fetched.

use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 46.0;
/// Between the names at the ends of lines.
const NAME_HEIGHT: f64 = 15.0;

/// A line of the plot.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub name: String,
    /// A class of the style below, and the variable with its colour.
    pub class: &'static str,
    pub is_dashed: bool,
    /// At each category; none: a gap.
    pub values: Vec<Option<f64>>,
}

/// A plot of one measure.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub title: String,
    pub unit: String,
    pub categories: Vec<String>,
    pub lines: Vec<Line>,
    /// Decades on the vertical axis, where values differ by more than one.
    pub is_logarithmic: bool,
}

/// Colours that can be told apart on white and on black.
const STYLE: &str = "\
.plot{font:12px system-ui,sans-serif;--ink:#1f2328;--grid:#d8dee4;--floor:#6e7781;--gantry:#0969da;\
--packet:#8250df;--port:#1a7f37;--pod:#1b7c83;--legacy:#9a6700;--iptables:#cf222e;--nft:#bc4c00}\
@media(prefers-color-scheme:dark){.plot{--ink:#e6edf3;--grid:#30363d;--floor:#9198a1;--gantry:#58a6ff;\
--packet:#bc8cff;--port:#56d364;--pod:#39c5cf;--legacy:#e3b341;--iptables:#ff7b72;--nft:#ffa657}}\
.plot text{fill:var(--ink)}.plot .grid{stroke:var(--grid)}.plot .title{font-weight:600;font-size:14px}\
.plot polyline{fill:none;stroke-width:2}.plot .dashed{stroke-dasharray:5 4}\
.floor{stroke:var(--floor);fill:var(--floor)}.gantry{stroke:var(--gantry);fill:var(--gantry)}\
.packet{stroke:var(--packet);fill:var(--packet)}.port{stroke:var(--port);fill:var(--port)}\
.pod{stroke:var(--pod);fill:var(--pod)}.legacy{stroke:var(--legacy);fill:var(--legacy)}\
.iptables{stroke:var(--iptables);fill:var(--iptables)}.nft{stroke:var(--nft);fill:var(--nft)}";

/// From values to places on the vertical axis.
struct Axis {
    low: f64,
    high: f64,
    is_logarithmic: bool,
}

impl Axis {
    fn of(plot: &Plot) -> Self {
        let values = plot
            .lines
            .iter()
            .flat_map(|line| line.values.iter().flatten());
        let values: Vec<f64> = values.copied().filter(|value| value.is_finite()).collect();
        let high = values.iter().copied().fold(0.0, f64::max);
        let least = values.iter().copied().filter(|value| *value > 0.0);
        let least = least.fold(f64::INFINITY, f64::min);
        // Decades need something above zero.
        if plot.is_logarithmic && least.is_finite() && high > least {
            let decade = |value: f64| 10_f64.powf(value);
            return Self {
                low: decade(least.log10().floor()),
                high: decade(high.log10().ceil()),
                is_logarithmic: true,
            };
        }
        Self {
            low: 0.0,
            high: if high > 0.0 { high * 1.08 } else { 1.0 },
            is_logarithmic: false,
        }
    }

    fn y(&self, value: f64) -> f64 {
        let share = if self.is_logarithmic {
            let value = value.max(self.low);
            (value / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        HEIGHT - BOTTOM - share.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
    }

    /// Where lines of the grid are.
    fn ticks(&self) -> Vec<f64> {
        if self.is_logarithmic {
            let first = self.low.log10().round() as i32;
            let last = self.high.log10().round() as i32;
            return (first..=last).map(|decade| 10_f64.powi(decade)).collect();
        }
        let rough = self.high / 5.0;
        let decade = 10_f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * decade);
        let step = steps.into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        let count = (self.high / step).floor() as usize;
        (0..=count).map(|tick| tick as f64 * step).collect()
    }
}

/// The whole document.
pub(super) fn draw(plot: &Plot) -> String {
    let mut svg = String::new();
    let axis = Axis::of(plot);
    put(
        &mut svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             role=\"img\" aria-label=\"{}\"><style>{STYLE}</style>",
            escape(&plot.title)
        ),
    );
    put(
        &mut svg,
        format_args!(
            "<text class=\"title\" x=\"{LEFT}\" y=\"20\">{}, {}</text>",
            escape(&plot.title),
            escape(&plot.unit)
        ),
    );
    for tick in axis.ticks() {
        let (y, right) = (axis.y(tick), WIDTH - RIGHT);
        put(
            &mut svg,
            format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                y + 4.0,
                tick_text(tick)
            ),
        );
    }
    for (index, category) in plot.categories.iter().enumerate() {
        put(
            &mut svg,
            format_args!(
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                x(index, plot.categories.len()),
                HEIGHT - BOTTOM + 20.0,
                escape(category)
            ),
        );
    }
    put(
        &mut svg,
        format_args!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">services</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 8.0
        ),
    );
    for line in &plot.lines {
        draw_line(&mut svg, plot, &axis, line);
    }
    for (line, y) in names(plot, &axis) {
        put(
            &mut svg,
            format_args!(
                "<text x=\"{}\" y=\"{:.1}\" style=\"fill:var(--{})\">{}</text>",
                WIDTH - RIGHT + 10.0,
                y + 4.0,
                line.class,
                escape(&line.name)
            ),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_line(svg: &mut String, plot: &Plot, axis: &Axis, line: &Line) {
    let dashed = if line.is_dashed { " dashed" } else { "" };
    let place = |(index, value): (usize, &Option<f64>)| {
        let value = value.filter(|value| value.is_finite())?;
        Some((x(index, plot.categories.len()), axis.y(value), value))
    };
    let places: Vec<Option<(f64, f64, f64)>> = line.values.iter().enumerate().map(place).collect();
    for part in places.split(Option::is_none) {
        let points: Vec<String> = part
            .iter()
            .flatten()
            .map(|(x, y, _)| format!("{x:.1},{y:.1}"))
            .collect();
        if points.len() > 1 {
            put(
                svg,
                format_args!(
                    "<polyline class=\"{}{dashed}\" points=\"{}\"/>",
                    line.class,
                    points.join(" ")
                ),
            );
        }
    }
    for (x, y, value) in places.into_iter().flatten() {
        put(
            svg,
            format_args!(
                "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{}: {}</title></circle>",
                line.class,
                escape(&line.name),
                super::text::short(value)
            ),
        );
    }
}

/// Names at the ends of lines, moved apart, in the order of the ends.
fn names<'a>(plot: &'a Plot, axis: &Axis) -> Vec<(&'a Line, f64)> {
    let end = |line: &'a Line| {
        let value = line.values.iter().rev().flatten().find(|v| v.is_finite())?;
        Some((line, axis.y(*value)))
    };
    let mut ends: Vec<(&Line, f64)> = plot.lines.iter().filter_map(end).collect();
    ends.sort_by(|a, b| a.1.total_cmp(&b.1));
    for index in 1..ends.len() {
        ends[index].1 = ends[index].1.max(ends[index - 1].1 + NAME_HEIGHT);
    }
    // What has been pushed over the edge pushes back.
    let mut lowest = HEIGHT - BOTTOM;
    for end in ends.iter_mut().rev() {
        end.1 = end.1.min(lowest);
        lowest = end.1 - NAME_HEIGHT;
    }
    ends
}

fn x(index: usize, count: usize) -> f64 {
    let width = WIDTH - LEFT - RIGHT;
    LEFT + width * (index as f64 + 0.5) / count.max(1) as f64
}

fn tick_text(value: f64) -> String {
    if value >= 10_000.0 {
        return format!("{}k", value / 1000.0);
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// For text and attributes of XML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn put(text: &mut String, part: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(part);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(name: &str, values: &[Option<f64>]) -> Line {
        Line {
            name: name.into(),
            class: "gantry",
            is_dashed: false,
            values: values.to_vec(),
        }
    }

    fn plot(lines: Vec<Line>) -> Plot {
        Plot {
            title: "loading <everything>".into(),
            unit: "ms".into(),
            categories: vec!["1".into(), "100".into(), "1000".into()],
            lines,
            is_logarithmic: false,
        }
    }

    /// Every element is closed, in order.
    fn is_well_formed(svg: &str) -> bool {
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let Some((tag, _)) = tag.split_once('>') else {
                return false;
            };
            let name = tag.split(' ').next().unwrap_or_default();
            match name.strip_prefix('/') {
                Some(name) if open.pop() != Some(name) => return false,
                Some(_) => {}
                None if tag.ends_with('/') => {}
                None => open.push(name),
            }
        }
        open.is_empty()
    }

    #[test]
    fn a_plot_has_a_line_with_a_gap_and_says_what_it_is() {
        let svg = draw(&plot(vec![
            line("a & b", &[Some(1.0), Some(2.0), Some(3.0)]),
            line("gap", &[Some(1.0), None, Some(3.0)]),
        ]));
        assert!(is_well_formed(&svg), "{svg}");
        assert_eq!(
            svg.matches("<polyline").count(),
            1,
            "two points with a gap are no line"
        );
        assert_eq!(svg.matches("<circle").count(), 5);
        assert!(svg.contains("loading &lt;everything&gt;, ms"));
        assert!(svg.contains(">a &amp; b</text>"));
        let outside = svg.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !outside.contains("http") && !outside.contains("url("),
            "nothing is fetched"
        );
    }

    #[test]
    fn an_axis_begins_at_zero_and_ends_above_the_highest() {
        let axis = Axis::of(&plot(vec![line("a", &[Some(31.0), Some(55.0)])]));
        assert_eq!(axis.ticks(), [0.0, 20.0, 40.0]);
        assert_eq!(axis.y(0.0), HEIGHT - BOTTOM);
        assert!(axis.y(55.0) > TOP);
    }

    #[test]
    fn decades_are_used_where_values_need_them() {
        let mut wide = plot(vec![line("a", &[Some(0.2), Some(1100.0)])]);
        wide.is_logarithmic = true;
        let axis = Axis::of(&wide);
        assert_eq!(axis.ticks(), [0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        assert!((axis.y(0.1) - axis.y(1.0) - (axis.y(100.0) - axis.y(1000.0))).abs() < 1e-6);
        // Nothing above zero: an ordinary axis.
        let mut none = plot(vec![line("a", &[Some(0.0)])]);
        none.is_logarithmic = true;
        assert!(!Axis::of(&none).is_logarithmic);
    }

    #[test]
    fn ticks_are_read_at_a_glance() {
        assert_eq!(
            [0.1, 0.0, 2.5, 400.0, 20_000.0].map(tick_text),
            ["0.1", "0", "2.5", "400", "20k"]
        );
    }

    proptest! {
        #[test]
        fn names_neither_overlap_nor_leave_the_plot(
            values in prop::collection::vec(0.0..1e6_f64, 1..15), is_logarithmic: bool
        ) {
            let lines = values.iter().map(|v| line("n", &[Some(*v), Some(*v), Some(*v)])).collect();
            let plot = Plot { is_logarithmic, ..plot(lines) };
            let ends = names(&plot, &Axis::of(&plot));
            prop_assert_eq!(ends.len(), values.len());
            for pair in ends.windows(2) {
                prop_assert!(pair[1].1 - pair[0].1 >= NAME_HEIGHT - 1e-6);
            }
            prop_assert!(ends.iter().all(|(_, y)| (0.0..=HEIGHT).contains(y)));
            prop_assert!(is_well_formed(&draw(&plot)));
        }
    }
}
