//! Metrics at one moment, and their text.

use std::fmt;

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows, from 0 at the start of the node.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations counted by size.
    Histogram,
}

/// Observations counted by size.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramValue {
    /// Upper bounds, ascending, inclusive.
    pub bounds: Vec<f64>,
    /// How many observations were within each bound and above the one before; one element more than `bounds`, for larger ones.
    pub counts: Vec<u64>,
    /// All observations together.
    pub sum: f64,
}

impl HistogramValue {
    /// How many observations there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum MetricValue {
    /// Of a counter or gauge.
    Number(f64),
    /// Of a histogram.
    Histogram(HistogramValue),
}

/// A value with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricSample {
    /// Names and values.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: MetricValue,
}

/// Everything under one name. `Display`: the text format of Prometheus.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricFamily {
    /// As Prometheus wants it: base units, `_total` for counters.
    pub name: String,
    /// One line for people.
    pub help: &'static str,
    /// What the values are.
    pub kind: MetricKind,
    /// One, or one for each combination of labels.
    pub samples: Vec<MetricSample>,
}

impl MetricFamily {
    pub(crate) fn new(name: &str, kind: MetricKind, help: &'static str) -> Self {
        Self { name: name.to_owned(), help, kind, samples: Vec::new() }
    }

    pub(crate) fn number(mut self, labels: &[(&'static str, &str)], value: f64) -> Self {
        self.push(labels, MetricValue::Number(value));
        self
    }

    pub(crate) fn push(&mut self, labels: &[(&'static str, &str)], value: MetricValue) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.samples.push(MetricSample { labels, value });
    }

    /// The same under another name.
    #[must_use]
    pub fn renamed(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }

    /// The number of the sample without labels; None: there is none.
    pub fn value(&self) -> Option<f64> {
        self.samples.iter().find(|sample| sample.labels.is_empty()).and_then(|sample| match sample.value {
            MetricValue::Number(value) => Some(value),
            MetricValue::Histogram(_) => None,
        })
    }
}

/// All metrics of a node at one moment. `Display`: the text format of Prometheus, version 0.0.4
/// (`Content-Type: text/plain; version=0.0.4`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// By name.
    pub families: Vec<MetricFamily>,
}

impl Metrics {
    /// The family of that name.
    pub fn get(&self, name: &str) -> Option<&MetricFamily> {
        self.families.iter().find(|family| family.name == name)
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.families.iter().try_for_each(|family| family.fmt(f))
    }
}

impl fmt::Display for MetricFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        let name = &self.name;
        writeln!(f, "# HELP {name} {}\n# TYPE {name} {kind}", self.help)?;
        for MetricSample { labels, value } in &self.samples {
            match value {
                MetricValue::Number(value) => {
                    write!(f, "{name}")?;
                    write_labels(f, labels, None)?;
                    writeln!(f, " {value}")?;
                }
                MetricValue::Histogram(histogram) => {
                    let mut upto = 0;
                    let bounds = histogram.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
                    for (bound, count) in bounds.zip(&histogram.counts) {
                        upto += count;
                        write!(f, "{name}_bucket")?;
                        write_labels(f, labels, Some(&bound))?;
                        writeln!(f, " {upto}")?;
                    }
                    for (suffix, value) in [("sum", histogram.sum), ("count", upto as f64)] {
                        write!(f, "{name}_{suffix}")?;
                        write_labels(f, labels, None)?;
                        writeln!(f, " {value}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn write_labels(f: &mut fmt::Formatter<'_>, labels: &[(&'static str, String)], bound: Option<&str>) -> fmt::Result {
    let all = labels.iter().map(|(name, value)| (*name, value.as_str())).chain(bound.map(|bound| ("le", bound)));
    let mut separator = '{';
    for (name, value) in all {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        write!(f, "{separator}{name}=\"{value}\"")?;
        separator = ',';
    }
    if separator == ',' { f.write_str("}") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format_of_prometheus() {
        let numbers = MetricFamily::new("reads_total", MetricKind::Counter, "Reads.")
            .number(&[("database", "a\"b\\c\n")], 3.0)
            .number(&[], 0.25);
        let mut times = MetricFamily::new("time_seconds", MetricKind::Histogram, "Time.");
        let value = HistogramValue { bounds: vec![0.001, 1.0], counts: vec![2, 0, 1], sum: 7.5 };
        times.push(&[("to", "x")], MetricValue::Histogram(value));
        let text = Metrics { families: vec![numbers.clone(), times] }.to_string();
        assert_eq!(
            text,
            "# HELP reads_total Reads.\n# TYPE reads_total counter\n\
             reads_total{database=\"a\\\"b\\\\c\\n\"} 3\nreads_total 0.25\n\
             # HELP time_seconds Time.\n# TYPE time_seconds histogram\n\
             time_seconds_bucket{to=\"x\",le=\"0.001\"} 2\n\
             time_seconds_bucket{to=\"x\",le=\"1\"} 2\n\
             time_seconds_bucket{to=\"x\",le=\"+Inf\"} 3\n\
             time_seconds_sum{to=\"x\"} 7.5\ntime_seconds_count{to=\"x\"} 3\n"
        );
        assert_eq!(numbers.value(), Some(0.25));
        assert!(numbers.renamed("other").to_string().contains("other 0.25\n"));
    }
}
