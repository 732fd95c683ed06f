//! What the table shows: events in, rows out. No I/O.

use std::{cmp::Ordering, time::Duration};

use ratatui::crossterm::event::KeyCode;

use super::traffic::{Key, Row, Traffic};
use crate::observe::pairs::Answer;

/// Something that happened.
#[derive(Debug)]
pub(super) enum Event {
    /// The daemons were asked.
    Asked {
        /// When, since a moment that stays the same.
        at: Duration,
        answers: Vec<Answer>,
        /// The nodes that cannot be reached, and why.
        missing: Vec<String>,
    },
    /// A key was pressed.
    Key(KeyCode),
}

/// Whether the program continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Continue,
    Quit,
}

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Client,
    Server,
    Port,
    Protection,
    Open,
    New,
    Up,
    Down,
    Median,
    Slowest,
    Refused,
}

/// The state of the table.
#[derive(Debug)]
pub(super) struct State {
    traffic: Traffic,
    pub(super) nodes: usize,
    pub(super) missing: Vec<String>,
    pub(super) sorted_by: Column,
    pub(super) is_descending: bool,
    /// What rows must contain. Empty: nothing.
    pub(super) filter: String,
    /// Whether keys go to the filter.
    pub(super) is_typing: bool,
    /// The workload whose pairs are shown. `None`: all.
    pub(super) workload: Option<String>,
    selected: Option<Key>,
}

/// Rows that a key for a page moves by.
const PAGE: isize = 10;

impl Default for State {
    /// Sorts by new connections, the most first.
    fn default() -> Self {
        Self {
            traffic: Traffic::default(),
            nodes: 0,
            missing: Vec::new(),
            sorted_by: Column::New,
            is_descending: true,
            filter: String::new(),
            is_typing: false,
            workload: None,
            selected: None,
        }
    }
}

impl State {
    /// Takes an event.
    pub(super) fn handle(&mut self, event: Event) -> Next {
        match event {
            Event::Asked {
                at,
                answers,
                missing,
            } => {
                self.nodes = answers.len();
                self.missing = missing;
                self.traffic.update(at, answers);
            }
            Event::Key(key) if self.is_typing => self.type_filter(key),
            Event::Key(KeyCode::Char('q')) => return Next::Quit,
            Event::Key(key) => self.press(key),
        }
        Next::Continue
    }

    /// The rows to show, in order.
    pub(super) fn rows(&self) -> Vec<&Row> {
        let filter = self.filter.to_lowercase();
        let is_shown = |row: &&Row| {
            let Key {
                client,
                server,
                port,
                protection,
            } = &row.key;
            let of_workload = |workload: &String| workload == client || workload == server;
            let text = format!("{client} {server}:{port} {protection}").to_lowercase();
            self.workload.as_ref().is_none_or(of_workload) && text.contains(&filter)
        };
        let mut rows: Vec<_> = self.traffic.rows.iter().filter(is_shown).collect();
        rows.sort_by(|a, b| {
            let order = self.sorted_by.compare(a, b);
            let order = match self.is_descending {
                true => order.reverse(),
                false => order,
            };
            order.then_with(|| a.key.cmp(&b.key))
        });
        rows
    }

    /// The index of the selected row. It follows its row wherever that moves.
    pub(super) fn selected(&self, rows: &[&Row]) -> Option<usize> {
        let found = rows
            .iter()
            .position(|row| Some(&row.key) == self.selected.as_ref());
        found.or((!rows.is_empty()).then_some(0))
    }

    fn press(&mut self, key: KeyCode) {
        match key {
            KeyCode::Down | KeyCode::Char('j') => self.select(1),
            KeyCode::Up | KeyCode::Char('k') => self.select(-1),
            KeyCode::PageDown => self.select(PAGE),
            KeyCode::PageUp => self.select(-PAGE),
            KeyCode::Home => self.select(isize::MIN),
            KeyCode::End => self.select(isize::MAX),
            KeyCode::Right | KeyCode::Char('>') => self.sort(1),
            KeyCode::Left | KeyCode::Char('<') => self.sort(Column::ALL.len() - 1),
            KeyCode::Char('r') => self.is_descending = !self.is_descending,
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Enter | KeyCode::Char('s') => self.drill(|key| &key.server),
            KeyCode::Char('c') => self.drill(|key| &key.client),
            KeyCode::Esc => match self.workload.take() {
                Some(_) => {}
                None => self.filter.clear(),
            },
            _ => {}
        }
    }

    fn type_filter(&mut self, key: KeyCode) {
        match key {
            KeyCode::Char(character) => self.filter.push(character),
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            _ => {}
        }
    }

    fn select(&mut self, by: isize) {
        let rows = self.rows();
        let Some(index) = self.selected(&rows) else {
            return;
        };
        let index = index.saturating_add_signed(by).min(rows.len() - 1);
        self.selected = Some(rows[index].key.clone());
    }

    /// Sorts by another column: numbers the largest first, names from A on.
    fn sort(&mut self, by: usize) {
        let columns = Column::ALL;
        let own = columns.iter().position(|column| *column == self.sorted_by);
        self.sorted_by = columns[(own.unwrap_or_default() + by) % columns.len()];
        self.is_descending = self.sorted_by.is_quantity();
    }

    fn drill(&mut self, into: impl Fn(&Key) -> &String) {
        let rows = self.rows();
        let selected = self.selected(&rows).map(|index| rows[index].key.clone());
        if let Some(key) = selected {
            self.workload = Some(into(&key).clone());
            self.selected = Some(key);
        }
    }
}

impl Column {
    /// From left to right.
    pub(super) const ALL: [Self; 11] = [
        Self::Client,
        Self::Server,
        Self::Port,
        Self::Protection,
        Self::Open,
        Self::New,
        Self::Up,
        Self::Down,
        Self::Median,
        Self::Slowest,
        Self::Refused,
    ];

    /// Whether large values matter most.
    pub(super) fn is_quantity(self) -> bool {
        !matches!(
            self,
            Self::Client | Self::Server | Self::Port | Self::Protection
        )
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        match self {
            Self::Client => a.key.client.cmp(&b.key.client),
            Self::Server => a.key.server.cmp(&b.key.server),
            Self::Port => a.key.port.cmp(&b.key.port),
            Self::Protection => a.key.protection.cmp(b.key.protection),
            Self::Open => a.open.cmp(&b.open),
            Self::New => a.new.total_cmp(&b.new),
            Self::Up => a.up.total_cmp(&b.up),
            Self::Down => a.down.total_cmp(&b.down),
            Self::Median | Self::Slowest => self.time(a).cmp(&self.time(b)),
            Self::Refused => a.refused.cmp(&b.refused),
        }
    }

    /// The connect time of this column.
    pub(super) fn time(self, row: &Row) -> Option<Duration> {
        row.connect_times.percentile(match self {
            Self::Median => 50,
            _ => 99,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::traffic::tests::{answer, pair, refused},
        *,
    };

    /// After two answers a second apart: `cart` calls `pay` the most, and is refused by `stock`.
    fn state() -> State {
        let mut state = State::default();
        for (second, pay, stock) in [(0, 10, 10), (1, 30, 15)] {
            let pairs = vec![
                pair("cart", "pay", pay),
                pair("web", "cart", stock),
                refused("cart", "stock", 4),
            ];
            let next = state.handle(Event::Asked {
                at: Duration::from_secs(second),
                answers: vec![answer("a", pairs)],
                missing: vec!["node b cannot be reached: gone".into()],
            });
            assert_eq!(next, Next::Continue);
        }
        state
    }

    fn press(state: &mut State, keys: impl IntoIterator<Item = KeyCode>) {
        for key in keys {
            assert_eq!(state.handle(Event::Key(key)), Next::Continue, "{key:?}");
        }
    }

    fn type_in(state: &mut State, text: &str) {
        press(state, text.chars().map(KeyCode::Char));
    }

    /// Client and server of each row, and a mark at the selected one.
    fn shown(state: &State) -> Vec<String> {
        let rows = state.rows();
        let selected = state.selected(&rows);
        let row = |(index, row): (usize, &&Row)| {
            let mark = if Some(index) == selected { "*" } else { "" };
            let short = |name: &str| name.trim_start_matches("shop/").to_owned();
            format!(
                "{mark}{} {}",
                short(&row.key.client),
                short(&row.key.server)
            )
        };
        rows.iter().enumerate().map(row).collect()
    }

    #[test]
    fn the_busiest_pair_is_first_and_q_quits() {
        let mut state = state();
        assert_eq!(shown(&state), ["*cart pay", "web cart", "cart stock"]);
        assert_eq!((state.nodes, state.missing.len()), (1, 1));
        assert_eq!(state.handle(Event::Key(KeyCode::Char('q'))), Next::Quit);
    }

    #[test]
    fn sorts_by_each_column_and_reverses() {
        let mut state = state();
        type_in(&mut state, "r");
        assert_eq!(shown(&state), ["*cart stock", "web cart", "cart pay"]);
        press(&mut state, [KeyCode::End]);
        assert_eq!(shown(&state)[2], "*cart pay");
        // Names begin with A.
        while state.sorted_by != Column::Client {
            type_in(&mut state, ">");
        }
        let by_client = ["*cart pay", "cart stock", "web cart"];
        assert_eq!(shown(&state), by_client, "the selection stays on its row");
        press(&mut state, [KeyCode::Left]);
        assert_eq!(
            (state.sorted_by, state.is_descending),
            (Column::Refused, true)
        );
        assert_eq!(shown(&state)[0], "cart stock");
    }

    #[test]
    fn filters_as_one_types() {
        let mut state = state();
        type_in(&mut state, "/STOq");
        assert!(shown(&state).is_empty(), "q is a letter here");
        press(&mut state, [KeyCode::Backspace]);
        assert_eq!(shown(&state), ["*cart stock"]);
        press(&mut state, [KeyCode::Enter]);
        type_in(&mut state, "j");
        assert_eq!(state.filter, "STO");
        press(&mut state, [KeyCode::Esc]);
        assert_eq!(shown(&state).len(), 3);
        type_in(&mut state, "/:8080 tls");
        assert_eq!(shown(&state).len(), 3);
        press(&mut state, [KeyCode::Esc]);
        assert_eq!((state.filter.as_str(), state.is_typing), ("", false));
    }

    #[test]
    fn drills_into_the_server_or_the_client() {
        let mut state = state();
        press(&mut state, [KeyCode::Enter]);
        assert_eq!(state.workload.as_deref(), Some("shop/pay"));
        assert_eq!(shown(&state), ["*cart pay"]);
        press(&mut state, [KeyCode::Esc]);
        assert_eq!(shown(&state).len(), 3);
        type_in(&mut state, "jc");
        assert_eq!(state.workload.as_deref(), Some("shop/web"));
        press(&mut state, [KeyCode::Esc]);
        assert_eq!(shown(&state)[1], "*web cart");
    }

    #[test]
    fn an_empty_table_takes_all_keys() {
        let mut state = State::default();
        press(
            &mut state,
            [
                KeyCode::Down,
                KeyCode::Up,
                KeyCode::End,
                KeyCode::Enter,
                KeyCode::Esc,
            ],
        );
        assert!(shown(&state).is_empty());
        assert_eq!(state.workload, None);
    }
}
