//! `auth-daemon top`: a live table of who talks to whom.

mod state;
mod traffic;

use std::{
    io::{self, IsTerminal},
    sync::mpsc::{Receiver, Sender, TryRecvError, channel},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as TableRow, Table, TableState, Wrap},
};

use self::{
    state::{Column, Event, Next, State},
    traffic::Row,
};
use super::{
    daemons::{Daemons, Selection},
    pairs,
};

/// How often daemons are asked, and through an API server, which serves at most ten requests a second, each of them.
const POLL: Duration = Duration::from_secs(1);
const POLL_EACH: Duration = Duration::from_millis(100);
/// How often to look for daemons that have joined or have been replaced.
const REFRESH: Duration = Duration::from_secs(10);
/// How long to wait for a key before the answers of daemons are shown.
const KEYS: Duration = Duration::from_millis(100);
/// Lines below the table that describe the selected row.
const DETAIL_LINES: u16 = 6;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    daemons: Selection,
}

pub(super) fn top(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        io::stdout().is_terminal() && io::stdin().is_terminal(),
        "top needs a terminal for its table and its keys; `auth-daemon observe` prints lines anywhere"
    );
    let daemons = Daemons::find(&arguments.daemons)?;
    // Before the table, so that the error is seen if there is none.
    let start = Instant::now();
    let (answers, missing) = pairs::read(&daemons)?;
    let mut state = State::default();
    state.handle(Event::Asked {
        at: start.elapsed(),
        answers,
        missing: missing.iter().map(ToString::to_string).collect(),
    });
    let (sender, events) = channel();
    // It ends with the program: an answer may take seconds, and q should not.
    thread::spawn(move || ask(daemons, start, &sender));
    ratatui::run(|terminal| run(terminal, &mut state, &events)).context("the terminal fails")
}

/// Asks the daemons again and again.
fn ask(mut daemons: Daemons, start: Instant, events: &Sender<Event>) {
    let mut refreshed = Instant::now();
    loop {
        let count = daemons.list().len().try_into().unwrap_or(u32::MAX);
        sleep(match daemons.in_cluster() {
            true => POLL.max(POLL_EACH.saturating_mul(count)),
            false => POLL,
        });
        if daemons.in_cluster() && refreshed.elapsed() >= REFRESH {
            refreshed = Instant::now();
            // If that fails, the known daemons are asked again.
            let _ = daemons.refresh();
        }
        let (answers, missing) = daemons.ask_all("/pairs");
        let asked = Event::Asked {
            at: start.elapsed(),
            answers: answers.into_iter().map(|(_, answer)| answer).collect(),
            missing: missing.iter().map(ToString::to_string).collect(),
        };
        if events.send(asked).is_err() {
            return;
        }
    }
}

fn run(
    terminal: &mut DefaultTerminal,
    state: &mut State,
    events: &Receiver<Event>,
) -> io::Result<()> {
    loop {
        terminal.draw(|frame| draw(frame, state))?;
        if event::poll(KEYS)?
            && let event::Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
        {
            let is_interrupt =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if is_interrupt || state.handle(Event::Key(key.code)) == Next::Quit {
                return Ok(());
            }
        }
        loop {
            match events.try_recv() {
                Ok(asked) => {
                    state.handle(asked);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    return Err(io::Error::other("the thread that asks daemons has ended"));
                }
            }
        }
    }
}

fn draw(frame: &mut Frame<'_>, state: &State) {
    let rows = state.rows();
    let missing = u16::from(!state.missing.is_empty());
    let [head, missing, table, details, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(missing),
        Constraint::Min(3),
        Constraint::Length(if rows.is_empty() { 0 } else { DETAIL_LINES }),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(summary(state, &rows), head);
    frame.render_widget(Line::from(state.missing.join("; ")).red(), missing);
    let selected = state.selected(&rows);
    match selected {
        Some(_) => draw_table(frame, state, &rows, selected, table),
        None => frame.render_widget(Paragraph::new(nothing(state)).wrap(Wrap::default()), table),
    }
    if let Some(index) = selected {
        frame.render_widget(describe(rows[index]), details);
    }
    let help = match state.is_typing {
        true => "type what rows must contain   Enter: done   Esc: show all",
        false => {
            "q: quit   arrows: select, sort by   r: reverse   /: filter   Enter, c: pairs of the server, of the client   \
             Esc: all"
        }
    };
    frame.render_widget(Line::from(help).dim(), keys);
}

/// The first line.
fn summary<'a>(state: &State, rows: &[&Row]) -> Line<'a> {
    let open: u64 = rows.iter().map(|row| row.open).sum();
    let new: f64 = rows.iter().map(|row| row.new).sum();
    let counted = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    };
    let (nodes, pairs) = (counted(state.nodes, "node"), counted(rows.len(), "pair"));
    let mut spans = vec![
        Span::from(format!("{nodes}, {pairs}, ")).bold(),
        Span::from(format!("{open} open, {new:.1} new/s")).bold(),
    ];
    if let Some(workload) = &state.workload {
        spans.push(Span::from(format!("   of {workload}")).cyan());
    }
    if state.is_typing || !state.filter.is_empty() {
        let cursor = if state.is_typing { "_" } else { "" };
        spans.push(Span::from(format!("   /{}{cursor}", state.filter)).cyan());
    }
    Line::from(spans)
}

/// What to say instead of an empty table.
fn nothing(state: &State) -> &'static str {
    match state.filter.is_empty() && state.workload.is_none() {
        true => {
            "No connection yet. The daemons count those of pods in the mesh; `auth-daemon status` shows which pods are."
        }
        false => "No pair matches. Esc shows all.",
    }
}

fn draw_table(
    frame: &mut Frame<'_>,
    state: &State,
    rows: &[&Row],
    selected: Option<usize>,
    area: Rect,
) {
    let header = Column::ALL.map(|column| {
        let is_sorted = column == state.sorted_by;
        let arrow = match (is_sorted, state.is_descending) {
            (false, _) => "",
            (true, true) => "▼",
            (true, false) => "▲",
        };
        let text = format!("{}{arrow}", column.title());
        let cell = aligned(column, text);
        match is_sorted {
            true => cell.style(Modifier::UNDERLINED),
            false => cell,
        }
    });
    let body = rows.iter().map(|row| {
        let cells = Column::ALL.map(|column| {
            let cell = aligned(column, column.text(row));
            cell.style(column.style(row))
        });
        TableRow::new(cells)
    });
    let widths = Column::ALL.map(Column::width);
    let table = Table::new(body, widths)
        .header(TableRow::new(header).bold())
        .row_highlight_style(Modifier::REVERSED);
    let mut table_state = TableState::default().with_selected(selected);
    frame.render_stateful_widget(table, area, &mut table_state);
}

fn aligned<'a>(column: Column, text: String) -> Cell<'a> {
    let line = Line::from(text);
    Cell::from(match column.is_quantity() || column == Column::Port {
        true => line.right_aligned(),
        false => line,
    })
}

/// What the selected row has no column for.
fn describe(row: &Row) -> Paragraph<'static> {
    let details = &row.details;
    let or_none = |text: &Option<String>, none: &str| text.as_deref().unwrap_or(none).to_owned();
    let end = |name: &str, identity: &Option<String>| {
        format!("{name}  {}", or_none(identity, "without an identity"))
    };
    let key_exchange = match &details.key_exchange {
        Some(group) => format!(", key exchange {group}"),
        None => String::new(),
    };
    let refused = match details.reason.is_empty() {
        true => "none was refused or reset".to_owned(),
        false => format!("the last that was refused or reset: {}", details.reason),
    };
    let service = or_none(&details.service, "no Service");
    let policy = or_none(&details.policy, "no policy decided");
    let text = format!(
        "client  {}\nserver  {}\n{}{key_exchange}; {service}; the last ended or was seen open at {}\n{refused}\n{policy}",
        end(&row.key.client, &details.client_identity),
        end(&row.key.server, &details.server_identity),
        row.key.protection,
        details.last,
    );
    Paragraph::new(text).wrap(Wrap { trim: true }).block(
        ratatui::widgets::Block::new()
            .borders(ratatui::widgets::Borders::TOP)
            .style(Style::new()),
    )
}

impl Column {
    fn title(self) -> &'static str {
        match self {
            Self::Client => "CLIENT",
            Self::Server => "SERVER",
            Self::Port => "PORT",
            Self::Protection => "ENCRYPTED",
            Self::Open => "OPEN",
            Self::New => "NEW/S",
            Self::Up => "UP/S",
            Self::Down => "DOWN/S",
            Self::Median => "P50",
            Self::Slowest => "P99",
            Self::Refused => "REFUSED",
        }
    }

    fn width(self) -> Constraint {
        match self {
            Self::Client | Self::Server => Constraint::Fill(1),
            Self::Port => Constraint::Length(6),
            Self::Protection => Constraint::Length(15),
            Self::Open | Self::New | Self::Refused => Constraint::Length(8),
            Self::Up | Self::Down | Self::Median | Self::Slowest => Constraint::Length(9),
        }
    }

    fn text(self, row: &Row) -> String {
        match self {
            Self::Client => row.key.client.clone(),
            Self::Server => row.key.server.clone(),
            Self::Port => row.key.port.to_string(),
            Self::Protection => row.key.protection.to_owned(),
            Self::Open => row.open.to_string(),
            Self::New => format!("{:.1}", row.new),
            Self::Up => bytes(row.up),
            Self::Down => bytes(row.down),
            Self::Median | Self::Slowest => self.time(row).map(time).unwrap_or_default(),
            Self::Refused => row.refused.to_string(),
        }
    }

    fn style(self, row: &Row) -> Style {
        let colour = match (self, row.key.protection) {
            (Self::Protection, "plaintext") => Some(Color::Yellow),
            (Self::Protection, _) => Some(Color::Green),
            (Self::Refused, _) if row.is_refusing => Some(Color::Red),
            _ => None,
        };
        colour.map_or(Style::new(), |colour| Style::new().fg(colour))
    }
}

/// Formats a number of bytes with three digits.
fn bytes(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "kB", "MB"] {
        if value < 999.5 {
            return match value < 9.95 && unit != "B" {
                true => format!("{value:.1} {unit}"),
                false => format!("{value:.0} {unit}"),
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} GB")
}

/// Formats a time with two or three digits.
fn time(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1000.0;
    match millis {
        ..9.95 => format!("{millis:.1} ms"),
        9.95..999.5 => format!("{millis:.0} ms"),
        _ => format!("{:.1} s", millis / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::{
        traffic::tests::{answer, pair, refused},
        *,
    };

    #[test]
    fn numbers_are_short() {
        for (value, expected) in [
            (0.0, "0 B"),
            (999.4, "999 B"),
            (1000.0, "1.0 kB"),
            (12_345.0, "12 kB"),
            (999_600.0, "1.0 MB"),
            (5.2e9, "5.2 GB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
        for (micros, expected) in [
            (50, "0.1 ms"),
            (2_300, "2.3 ms"),
            (42_000, "42 ms"),
            (1_500_000, "1.5 s"),
        ] {
            assert_eq!(time(Duration::from_micros(micros)), expected);
        }
    }

    fn screen(state: &State) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(110, 14)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| {
            (0..110)
                .map(|x| buffer[(x, y)].symbol())
                .collect::<String>()
        };
        (0..14).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn shows_rows_details_and_who_is_missing() {
        let mut state = State::default();
        let shown = screen(&state);
        assert!(shown[1].starts_with("No connection yet."), "{shown:#?}");
        for (second, opened) in [(0, 10), (1, 12)] {
            let pairs = vec![pair("cart", "pay", opened), refused("cart", "pay", 3)];
            state.handle(Event::Asked {
                at: Duration::from_secs(second),
                answers: vec![answer("a", pairs)],
                missing: vec!["node b cannot be reached: gone".into()],
            });
        }
        let shown = screen(&state);
        let words = |line: usize| shown[line].split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(0), "1 node, 1 pair, 1 open, 2.0 new/s");
        assert_eq!(words(1), "node b cannot be reached: gone");
        assert_eq!(
            words(2),
            "CLIENT SERVER PORT ENCRYPTED OPEN NEW/S▼ UP/S DOWN/S P50 P99 REFUSED"
        );
        assert_eq!(
            words(3),
            "shop/cart shop/pay 8080 TLS 1.3 1 2.0 20 B 40 B 2.0 ms 2.0 ms 3"
        );
        let all = shown.join("\n");
        for part in [
            "client  shop/cart  spiffe://cluster.local/ns/shop/sa/cart",
            "no Service; the last ended or was seen open at 2026-01-03T00:00:00.000Z",
            "refused or reset: denied [31m by AuthorizationPolicy shop/p",
            "q: quit",
        ] {
            assert!(all.contains(part), "{part:?} is not in\n{all}");
        }
        state.handle(Event::Key(KeyCode::Char('/')));
        state.handle(Event::Key(KeyCode::Char('z')));
        let shown = screen(&state);
        assert!(shown[0].ends_with("/z_"), "{shown:#?}");
        assert!(shown[2].starts_with("No pair matches."), "{shown:#?}");
    }
}
