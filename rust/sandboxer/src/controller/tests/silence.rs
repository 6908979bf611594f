//! Guests that do not answer, and what is to be seen of it.

use serde_json::Value;

use super::*;

async fn silence(client: &mut Client) -> Value {
    let status = status(client).await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY", "it may only be starved");
    serde_json::from_str::<Value>(&status.info["kuasar"]).unwrap()["guestSilent"].clone()
}

/// Has the guest asked for its time, and waits until its silence is, or is not, shown.
async fn asked(lab: &Lab, client: &mut Client, silent: bool) -> Value {
    lab.hypervisor.resumptions.send_modify(|count| *count += 1);
    for _ in 0..400 {
        let said = silence(client).await;
        if said.is_object() == silent {
            return said;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not within 10 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_answer_is_shown_until_it_does() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    let before = std::time::SystemTime::now();
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    assert_eq!(asked(&lab, &mut client, false).await, Value::Null);
    lab.hypervisor.hangs_up.store(true, Ordering::Relaxed);
    let first = asked(&lab, &mut client, true).await;
    let why = first["why"].as_str().unwrap();
    assert!(why.starts_with("connecting to the guest's agent at hvsock://"), "{why}");
    let since = first["since"].as_str().unwrap();
    let read: prost_types::Timestamp = since.parse().expect("a time that a person reads");
    assert!(std::time::SystemTime::try_from(read).unwrap() >= before, "{since}");
    // It is asked again, and what counts is the first time.
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(asked(&lab, &mut client, true).await["since"], first["since"]);
    lab.hypervisor.hangs_up.store(false, Ordering::Relaxed);
    asked(&lab, &mut client, false).await;

    // A later caller finds out by itself.
    lab.hypervisor.hangs_up.store(true, Ordering::Relaxed);
    pods.leave();
    drop((client, pods));
    let (mut client, _pods) = serve(&lab).await;
    asked(&lab, &mut client, true).await;
    // Of one that has ended, it is no news.
    stop(&mut client).await.unwrap();
    let ended = status(&mut client).await.unwrap();
    let ours: Value = serde_json::from_str(&ended.info["kuasar"]).unwrap();
    assert_eq!(ours["guestSilent"], Value::Null);
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}
