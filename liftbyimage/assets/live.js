// Asks for the newest state, shows it, and asks again: at the pace of this browser, which holds up nobody.
(() => {
  const at = (id) => document.getElementById(id);
  const skeleton = orbit(at("skeleton"), { bones: DATA.bones, sides: DATA.sides, empty: "nobody seen" });
  at("reset").addEventListener("click", skeleton.reset);

  const say = (text, ended = false) => {
    if (at("state").textContent !== text) at("state").textContent = text;
    at("state").classList.toggle("ended", ended);
  };

  const row = (stage, share) => {
    const line = document.createElement("tr");
    const texts = [
      stage.stage,
      stage.median_ms ? stage.median_ms.toFixed(2) : "",
      stage.fps ? stage.fps.toFixed(1) : "",
      share === null ? "beside it" : `${(100 * share).toFixed(1)} %`,
    ];
    for (const text of texts) line.insertCell().textContent = text;
    const cell = line.insertCell();
    cell.className = "bar";
    const bar = document.createElement("div");
    bar.style.width = `${100 * (share ?? 0)}%`;
    cell.append(bar);
    return line;
  };

  const showTable = (table) => {
    if (!table.frames) return;
    at("fps").textContent = table.fps.toFixed(1);
    at("lifted").textContent = table.people;
    at("of").textContent = table.frames;
    at("dropped").textContent = table.dropped;
    at("stages").tBodies[0].replaceChildren(
      ...table.stages.map((stage) => row(stage, stage.share)),
      row({ stage: "other" }, table.other_seconds / table.seconds),
    );
  };

  const show = async (state) => {
    showTable(state.table);
    if (state.ended) {
      at("window").textContent = `over all ${state.table.frames} frames`;
      say(`Ended: ${state.ended}.`, true);
      return;
    }
    say("Live.");
    skeleton.setPoses({ person: { joints: state.pose_3d } });
    at("frame").textContent = `frame ${state.frame}, ${state.time.toFixed(2)} s`;
    at("picture").src = state.picture;
    await at("picture").decode().catch(() => {}); // one that cannot be shown gives way to the next
  };

  const follow = async () => {
    let number = 0;
    for (;;) {
      let state = null;
      try {
        const response = await fetch(`next?after=${number}`);
        if (!response.ok) throw new Error(response.statusText);
        if (response.status === 200) state = await response.json();
        else if (number) say("Waiting for the next frame …");
      } catch {
        say("The program does not answer: has it ended?", true);
        await new Promise((resolve) => setTimeout(resolve, 2000));
        continue;
      }
      if (state) {
        number = state.number_of_state;
        await show(state);
        if (state.ended) return;
      }
      await new Promise(requestAnimationFrame);
    }
  };
  follow();
})();
