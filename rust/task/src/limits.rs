//! Limits of every call: it ends, and a defect in it ends nothing but itself.

use std::{
    any::Any,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    time::Duration,
};

use tokio::time::timeout;
use ttrpc::{Code, Response};

/// Longest that a call may take that says nothing else. A little more than what calls have that do work with
/// a deadline of its own, so that those word their errors themselves.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Calls that wait for something that may never happen, or for as long as they say: their caller's deadline
/// is theirs.
const PATIENT: [&str; 3] = ["GetEvents", "Shutdown", "Wait"];

/// The deadline of a method, if it has one of its own.
fn deadline(method: &str) -> Option<Duration> {
    (!PATIENT.contains(&method)).then_some(DEADLINE)
}

/// Answers for a call that does not end, or panics.
///
/// # Errors
/// Those of `call`.
pub async fn bounded(
    method: &str,
    call: impl Future<Output = ttrpc::Result<Response>>,
) -> ttrpc::Result<Response> {
    let call = unless_it_panics(call);
    let answer = match deadline(method) {
        Some(deadline) => match timeout(deadline, call).await {
            Ok(answer) => answer,
            Err(_) => {
                return Ok(refusal(
                    Code::DEADLINE_EXCEEDED,
                    format!("{method} did not end within {} s", deadline.as_secs()),
                ));
            }
        },
        None => call.await,
    };
    answer.unwrap_or_else(|panic| {
        Ok(refusal(Code::INTERNAL, format!("{method}: a defect of the agent: it panicked: {panic}")))
    })
}

fn refusal(code: Code, why: String) -> Response {
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(code, why));
    response
}

/// The result of the work, or the message of its panic.
pub(crate) async fn unless_it_panics<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let mut work = pin!(work);
    poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
        match polled {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panic_message(panic.as_ref()))),
        }
    })
    .await
}

pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn every_call_ends_but_those_that_wait_for_something() {
        for method in ["Create", "Kill", "State", "Stats", "SetupSandbox", "UpdateRoutes", "of tomorrow"] {
            let answer = timeout(DEADLINE * 2, bounded(method, pending())).await.expect(method).unwrap();
            assert_eq!(answer.status().code(), Code::DEADLINE_EXCEEDED);
            assert_eq!(answer.status().message(), format!("{method} did not end within 120 s"));
        }
        for method in PATIENT {
            assert!(timeout(DEADLINE * 100, bounded(method, pending())).await.is_err(), "{method}");
        }
    }

    #[tokio::test]
    async fn a_call_that_panics_is_answered() {
        let broken = bounded("State", async {
            tokio::task::yield_now().await;
            panic!("no {}", "way");
        });
        let answer = broken.await.unwrap();
        assert_eq!(answer.status().code(), Code::INTERNAL);
        assert_eq!(answer.status().message(), "State: a defect of the agent: it panicked: no way");
    }
}
