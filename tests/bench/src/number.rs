//! Formats numbers for people, with three significant digits.

/// Formats a number as `74,012`, `312`, `14.2`, `5.21` or `0.035`.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 999.5 {
        thousands(value)
    } else if size >= 99.95 {
        format!("{value:.0}")
    } else if size >= 9.995 {
        format!("{value:.1}")
    } else if size >= 0.1 || value == 0.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 {
        text.insert(0, '-');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_matter() {
        for (value, text) in [
            (74_012.4, "74,012"),
            (1_234_567.0, "1,234,567"),
            (999.6, "1,000"),
            (312.4, "312"),
            (14.23, "14.2"),
            (5.214, "5.21"),
            (0.0351, "0.035"),
            (0.0, "0.00"),
            (-1500.0, "-1,500"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
