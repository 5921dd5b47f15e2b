//! Figures: minimum, median, 99th percentile, and the ratio of medians to a rival.

/// Measured values of one metric of one program.
#[derive(Debug, Default, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// The value below which `percent` of the values lie (nearest rank).
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1) - 1;
        self.0.get(rank).copied().unwrap_or(f64::NAN)
    }
}

/// One line of the result.
#[derive(Debug)]
pub struct Report {
    metric: &'static str,
    unit: &'static str,
    of: &'static str,
    n: usize,
    min: f64,
    p50: f64,
    p99: f64,
    /// All values, the smallest first.
    samples: Samples,
    /// A rival, and our median divided by its.
    versus: Option<(&'static str, f64)>,
}

/// The figures of all arms, the first of which is ours, and ours against each of the others.
pub fn compare(metric: &'static str, unit: &'static str, arms: &[&'static str], samples: &[Samples]) -> Vec<Report> {
    let of = |arm: &'static str, s: &Samples| Report {
        metric,
        unit,
        of: arm,
        n: s.0.len(),
        min: s.percentile(0),
        p50: s.percentile(50),
        p99: s.percentile(99),
        samples: s.clone(),
        versus: None,
    };
    let mut reports: Vec<Report> = arms.iter().zip(samples).map(|(arm, s)| of(arm, s)).collect();
    if let (Some(us), Some(ours)) = (arms.first(), samples.first()) {
        for (arm, theirs) in arms.iter().zip(samples).skip(1) {
            let ratio = ours.percentile(50) / theirs.percentile(50);
            reports.push(Report { versus: Some((*arm, ratio)), ..of(us, ours) });
        }
    }
    reports
}

impl Report {
    /// As one JSON object; with all values, if nothing is compared.
    pub fn json(&self) -> String {
        let mut value = serde_json::json!({
            "metric": self.metric, "unit": self.unit, "of": self.of, "n": self.n,
            "min": self.min, "p50": self.p50, "p99": self.p99,
        });
        if let Some((versus, ratio)) = self.versus {
            value["versus"] = versus.into();
            value["ratio"] = ratio.into();
        } else {
            value["samples"] = self.samples.0.clone().into();
        }
        value.to_string()
    }

    /// For people.
    pub fn text(&self) -> String {
        let Self { metric, unit, of, n, min, p50, p99, .. } = self;
        let line = format!("{metric} of {of}: min {min:.2}, median {p50:.2}, p99 {p99:.2} {unit} (n={n})");
        match self.versus {
            Some((versus, ratio)) => format!("{line}; {ratio:.2} times {versus}"),
            None => line,
        }
    }
}
