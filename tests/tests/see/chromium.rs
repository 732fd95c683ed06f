//! Chromium, driven through its DevTools protocol (<https://chromedevtools.github.io/devtools-protocol/>).

use std::{
    fs,
    net::TcpStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_tests::{Place, Process, TIMEOUT, eventually};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

/// A page in a browser that runs in a place. Its complaints are collected.
pub(crate) struct Chromium {
    socket: WebSocket<TcpStream>,
    /// The page's.
    session: Option<Value>,
    next: u64,
    complaints: Vec<String>,
    _process: Process,
}

impl Chromium {
    /// Starts the browser. Returns `None`, after saying so, if there is none on this machine.
    pub(crate) fn start(test: &str, place: &Place) -> Result<Option<Self>> {
        let is_installed = std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|folder| folder.join("chromium").is_file())
        });
        if !is_installed {
            println!("SKIPPED {test}: chromium is not installed (Debian package chromium)");
            return Ok(None);
        }
        let profile = place.folder().join("chromium");
        // In a process namespace of its own, none of its many processes outlives the test.
        let mut command = place.command("unshare")?;
        command
            .args([
                "--fork",
                "--pid",
                "--kill-child",
                "--mount-proc",
                "chromium",
            ])
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            .args([
                "--no-first-run",
                "--disable-background-networking",
                "--disable-sync",
            ])
            .args([
                "--disable-component-update",
                "--hide-scrollbars",
                "--lang=en",
            ])
            .arg(format!("--user-data-dir={}", profile.display()))
            .args(["--remote-debugging-port=0", "about:blank"])
            .env("HOME", place.folder())
            // It is killed, and leaves its temporary files.
            .env("TMPDIR", place.folder());
        let process = Process::spawn(command)?;
        let port_file = profile.join("DevToolsActivePort");
        let (port, path): (u16, String) = eventually(TIMEOUT, "the browser's port", || {
            let text = fs::read_to_string(&port_file).ok()?;
            let (port, path) = text.split_once('\n')?;
            Some((port.parse().ok()?, path.trim_end().to_owned()))
        })
        .with_context(|| process.stderr())?;
        let stream = place.connect(([127, 0, 0, 1], port).into())?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let url = format!("ws://127.0.0.1:{port}{path}");
        let (socket, _) = tungstenite::client(url, stream).context("the browser's WebSocket")?;
        let mut browser = Self {
            socket,
            session: None,
            next: 0,
            complaints: Vec::new(),
            _process: process,
        };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let page = json!({"targetId": page["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", page)?["sessionId"].take();
        browser.session = Some(session);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.appear(1440, 900, false)?;
        Ok(Some(browser))
    }

    /// Sets the size of the window, and whether the user prefers dark colours.
    pub(crate) fn appear(&mut self, width: u32, height: u32, dark: bool) -> Result<()> {
        let size =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let value = if dark { "dark" } else { "light" };
        let feature = json!({"name": "prefers-color-scheme", "value": value});
        self.call("Emulation.setEmulatedMedia", json!({"features": [feature]}))?;
        Ok(())
    }

    /// Opens a page.
    pub(crate) fn open(&mut self, url: &str) -> Result<()> {
        let answer = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(answer["errorText"].is_null(), "{url}: {answer}");
        Ok(())
    }

    /// Returns the value of a JavaScript expression in the page.
    pub(crate) fn value(&mut self, expression: &str) -> Result<Value> {
        let question =
            json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.call("Runtime.evaluate", question)?;
        let exception = &answer["exceptionDetails"];
        ensure!(exception.is_null(), "{expression}: {exception}");
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is neither null, false, 0 nor empty. Returns it, and how long that took.
    pub(crate) fn wait(&mut self, what: &str, expression: &str) -> Result<(Value, Duration)> {
        let start = Instant::now();
        let expression =
            format!("((found) => found instanceof Node || found || null)({expression})");
        let found = eventually(TIMEOUT, what, || {
            // A page that loads has no elements yet.
            let value = self.value(&expression).ok()?;
            (!value.is_null() && value != false).then_some(value)
        });
        let elapsed = start.elapsed();
        match found {
            Ok(found) => Ok((found, elapsed)),
            Err(error) => {
                let page = self.value("document.body.innerText")?;
                Err(error.context(format!("{expression}\n{page}\n{:?}", self.complaints)))
            }
        }
    }

    /// Clicks in the middle of an element, as a mouse does.
    pub(crate) fn click(&mut self, element: &str) -> Result<()> {
        let place = format!(
            "(() => {{ const one = {element}; one.scrollIntoView({{block: 'nearest'}}); \
             const at = one.getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2]; }})()"
        );
        let (place, _) = self.wait("place to click", &place)?;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({
                "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1,
            });
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// Presses a key that is named as in `KeyboardEvent.key`.
    pub(crate) fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "ArrowLeft" => 37,
            "ArrowRight" => 39,
            _ => bail!("no code of {key} is known"),
        };
        for kind in ["rawKeyDown", "keyUp"] {
            let event =
                json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Types text into the element that has the focus.
    pub(crate) fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text}))?;
        Ok(())
    }

    /// Keeps a picture of the page in `target/tmp`.
    pub(crate) fn keep(&mut self, name: &str) -> Result<()> {
        let answer = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        let picture = answer["data"].as_str().context("no picture")?;
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("see-{name}.png"));
        fs::write(&path, BASE64_STANDARD.decode(picture)?)?;
        println!("kept {}", path.display());
        Ok(())
    }

    /// Returns what the browser complained about since the last call: errors in the console, exceptions, and violations of
    /// the page's Content-Security-Policy.
    pub(crate) fn complaints(&mut self) -> Result<Vec<String>> {
        // Its events come in order, so all events from before this answer have arrived.
        self.value("1")?;
        Ok(std::mem::take(&mut self.complaints))
    }

    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let mut call = json!({"id": id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            call["sessionId"] = session.clone();
        }
        self.socket.send(Message::text(call.to_string()))?;
        loop {
            let message = self.socket.read().with_context(|| method.to_owned())?;
            let Message::Text(text) = message else {
                continue;
            };
            let mut message: Value = serde_json::from_str(&text)?;
            if message["id"] == id {
                let error = &message["error"];
                ensure!(error.is_null(), "{method}: {error}");
                return Ok(message["result"].take());
            }
            self.take_event(&message);
        }
    }

    fn take_event(&mut self, event: &Value) {
        let parameters = &event["params"];
        let is_complaint = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => ["error", "warning", "assert"]
                .map(Value::from)
                .contains(&parameters["type"]),
            Some("Log.entryAdded") => ["error", "warning"]
                .map(Value::from)
                .contains(&parameters["entry"]["level"]),
            _ => false,
        };
        if is_complaint {
            self.complaints.push(parameters.to_string());
        }
    }
}
