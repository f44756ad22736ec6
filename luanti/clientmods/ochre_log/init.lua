-- For each drawn frame: one line in the log, and the frame's number as a barcode above and below the kept picture,
-- so that the recorder can prove which line belongs to which picture.

local BITS, CELL = 14, 16 -- CELL: pixels, also the height of the strips that the recorder cuts off
local WHITE = "default_cloud.png^[colorize:#ffffff:255"
local BLACK = "default_cloud.png^[colorize:#000000:255"

local frame = 0
local cells = {} -- [bit] = {above = hud id, below = hud id, shown = 0 or 1}

local function add_cell(player, bit, edge)
	return player:hud_add({
		hud_elem_type = "image",
		position = {x = 0, y = edge},
		offset = {x = bit * CELL + CELL / 2, y = edge == 0 and CELL / 2 or -CELL / 2},
		alignment = {x = 0, y = 0},
		scale = {x = 1, y = 1},
		text = BLACK,
		z_index = 1000,
	})
end

local function draw_barcode(player)
	local rest = frame
	for bit = 0, BITS - 1 do
		local value = rest % 2
		rest = (rest - value) / 2
		local cell = cells[bit]
		if not cell then
			cell = {above = add_cell(player, bit, 0), below = add_cell(player, bit, 1)}
			cells[bit] = cell
		end
		if cell.shown ~= value then
			cell.shown = value
			player:hud_change(cell.above, "text", value == 1 and WHITE or BLACK)
			player:hud_change(cell.below, "text", value == 1 and BLACK or WHITE) -- its negative
		end
	end
end

minetest.register_on_receiving_chat_message(function() return true end) -- no text in the picture

minetest.register_globalstep(function(dtime)
	local player, camera = minetest.localplayer, minetest.camera
	if not player or not camera then return end
	frame = frame + 1
	draw_barcode(player)
	local keys = player:get_control()
	local pos = player:get_pos()
	local eye = {x = pos.x, y = pos.y + 1.47, z = pos.z}
	local function name_at(at)
		local node = minetest.get_node_or_nil(at)
		return node and node.name or ""
	end
	-- The camera's own place is that of the frame before: it is moved after this.
	local view = camera:get_pos()
	minetest.log("action", "OCHRE frame " .. minetest.write_json({
		n = frame,
		dt = dtime,
		yaw = math.deg(camera:get_look_horizontal() or 0),
		pitch = math.deg(camera:get_look_vertical() or 0),
		pos = {pos.x, pos.y, pos.z},
		view = {view.x, view.y, view.z},
		keys = {
			forward = keys.up, back = keys.down, left = keys.left, right = keys.right,
			jump = keys.jump, sneak = keys.sneak,
		},
		node = name_at(eye),
		feet = name_at({x = pos.x, y = pos.y + 0.3, z = pos.z}),
		light = minetest.get_node_light(eye, 0.5) or -1,
	}))
end)
